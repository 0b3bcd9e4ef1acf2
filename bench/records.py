"""What was measured, as it was measured: one JSON file per part under build/, from which the page is made.

A part that ends writes `<part>.json`. While it runs, and where it stops, its complete blocks are in
`<part>.partial.json`: nothing that was measured is lost, and a part that was whole before stays on the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec

_PARTIAL = ".partial.json"


class Subject(NamedTuple):
    """What a figure is of. target: a transport of the server, a peer, or ONNX Runtime alone."""

    model: str
    target: str
    load: str


@dataclass(frozen=True)
class Sample:
    """One run. What is not known of it is 0.

    rate: answers per second, in time where there is a deadline. Latencies are milliseconds and count from when a
    request was due, perf_analyzer's from when it was sent. server_cpu_us: the server's CPU time per answer.
    client_cores: the busiest generator process's CPU seconds per second. answered, unanswered, computed: requests with
    and without an answer and rows that the server computed, warm-up included. rows: per batch. lost_points: of
    accuracy, None unless weights are trained. late: the share of requests that the client sent after they were due,
    where it tells. latencies_ms: of every answer, where percentiles of all blocks together are wanted. resident_mib:
    the server's memory after the run.
    """

    rate: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    queue_p50_ms: float = 0.0
    inference_p50_ms: float = 0.0
    server_cpu_us: float = 0.0
    client_cores: float = 0.0
    answered: int = 0
    unanswered: int = 0
    computed: int = 0
    rows: int = 0
    lost_points: float | None = None
    late: float = 0.0
    latencies_ms: tuple[float, ...] = ()
    resident_mib: float = 0.0

    def __str__(self) -> str:
        known = [f"{self.rate:,.1f}/s"] if self.rate else []
        known += [f"p50 {self.p50_ms:.2f} ms, p99 {self.p99_ms:.2f} ms"] if self.p99_ms else []
        known += [f"{self.unanswered} not answered"] if self.unanswered else []
        known += [f"{self.resident_mib:.0f} MiB"] if self.resident_mib else []
        return ", ".join(known) or "nothing answered"


@dataclass(frozen=True)
class Run:
    subject: Subject
    sample: Sample


Block: TypeAlias = tuple[Run, ...]
"""Every subject of a part once, close together in time."""


@dataclass(frozen=True)
class Record:
    """One part. started: UTC, ISO 8601. wanted: blocks asked for. notes: facts that belong beside the figures. error:
    why there are fewer blocks."""

    part: str
    started: str
    machine: str
    wanted: int
    blocks: tuple[Block, ...] = ()
    notes: tuple[str, ...] = ()
    error: str = ""

    def of(self, model: str, target: str, load: str) -> list[Sample]:
        """Block by block; empty for what was not measured."""
        subject = Subject(model, target, load)
        return [run.sample for block in self.blocks for run in block if run.subject == subject]

    def subjects(self) -> list[Subject]:
        return list(dict.fromkeys(run.subject for block in self.blocks for run in block))


class Records:
    """The folder that keeps them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, record: Record, *, ended: bool) -> None:
        """ended: the part is whole."""
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{record.part}{_PARTIAL}"
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
        if ended:
            partial.replace(self._folder / f"{record.part}.json")

    def best(self, part: str) -> Record | None:
        """What the page shows: the whole run, else what there is of one that stopped."""
        record = self._read(f"{part}.json") or self.stopped(part)
        return record if record is not None and record.blocks else None

    def stopped(self, part: str) -> Record | None:
        """The last run, where it did not come to its end."""
        return self._read(f"{part}{_PARTIAL}")

    def _read(self, name: str) -> Record | None:
        file = self._folder / name
        return msgspec.json.decode(file.read_bytes(), type=Record) if file.is_file() else None
