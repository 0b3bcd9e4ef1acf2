"""Speed of a file on this machine's processor. The figures hold for this machine only."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from export.arrays import Arrays, row_count
from export.verify import Advance, open_session, run

SPEEDUP_BATCH = 8


@dataclass(frozen=True)
class BatchTiming:
    """One file at one batch size: the median latency of a run and its 95th percentile."""

    batch_size: int
    median_ms: float
    p95_ms: float

    @property
    def rows_per_second(self) -> float:
        return 1000 * self.batch_size / self.median_ms


def of_batch(inputs: Arrays, batch_size: int) -> dict[str, np.ndarray]:
    """The rows of `inputs`, repeated to `batch_size` rows."""
    rows = np.arange(batch_size) % row_count(inputs)
    return {name: array[rows] for name, array in inputs.items()}


def measure(session: ort.InferenceSession, inputs: Arrays, budget_s: float) -> BatchTiming:
    """Runs `inputs` for about `budget_s`, at least three times, after one warm-up run."""
    run(session, inputs)
    milliseconds: list[float] = []
    ends = time.perf_counter() + budget_s
    while len(milliseconds) < 3 or (time.perf_counter() < ends and len(milliseconds) < 2000):
        milliseconds.append(1000 * _seconds(session, inputs))
    return BatchTiming(row_count(inputs), statistics.median(milliseconds), float(np.percentile(milliseconds, 95)))


def speedup(fp32: Path, variant: Path, inputs: Arrays, advance: Advance = lambda *_: None, rounds: int = 5) -> float:
    """Throughput of `variant` over that of `fp32`: one thread, both in turn, the best of `rounds` runs of each."""
    batch = of_batch(inputs, SPEEDUP_BATCH)
    sessions = [open_session(path, threads=1) for path in (fp32, variant)]
    for session in sessions:
        run(session, batch)
    taken = []
    for number in range(rounds):
        advance(number, rounds)
        taken.append([_seconds(session, batch) for session in sessions])
    return min(one for one, _ in taken) / min(other for _, other in taken)


def processor() -> str:
    """The processor's name in Linux, and the number of threads available to this process."""
    names = [line for line in _cpuinfo() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else "unknown processor"
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} threads"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _seconds(session: ort.InferenceSession, inputs: Mapping[str, np.ndarray]) -> float:
    started = time.perf_counter()
    run(session, inputs)
    return time.perf_counter() - started
