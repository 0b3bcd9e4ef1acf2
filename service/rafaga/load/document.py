"""A run as JSON: its options, the raw counts, and the figures computed from them. Parts of one run can be merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from rafaga.load.codecs.base import Wire
from rafaga.load.figures import Figures, GeneratorUse, Objective
from rafaga.load.histogram import Distribution
from rafaga.load.schedule import SchedulePart
from rafaga.load.server_metrics import ServerWindow
from rafaga.load.steps import Step
from rafaga.load.tally import Tally

SCHEMA = 1


class DocumentError(Exception):
    """Not a result of `rafaga load`, or documents that are not parts of one run."""


@dataclass(frozen=True)
class Conditions:
    """What was the same in every step. models: weights by name. payload: what was sent, in words.

    slo_p99_ms: the objective of models that have none in slo_p99_ms_by_model.
    """

    protocol: Wire
    models: dict[str, float]
    payload: str
    deadline_ms: float
    seed: int
    slo_p99_ms: float | None = None
    slo_p99_ms_by_model: dict[str, float] = field(default_factory=dict)

    @property
    def objective(self) -> Objective | None:
        if self.slo_p99_ms is None and not self.slo_p99_ms_by_model:
            return None
        return Objective(self.slo_p99_ms, self.slo_p99_ms_by_model)


@dataclass(frozen=True)
class StepResult:
    """tally: raw counts, from which the figures can be computed again. server: None without --metrics."""

    step: Step
    figures: Figures
    tally: Tally
    generators: tuple[GeneratorUse, ...]
    server: ServerWindow | None = None


@dataclass(frozen=True)
class LoadRun:
    """schema: of this document. started: UTC, ISO 8601. max_rate: what --find-max found, requests per second.

    addresses: how many shared the calls, where --metrics was given.
    """

    schema: int
    rafaga: str
    started: str
    server: str
    conditions: Conditions
    part: SchedulePart
    steps: tuple[StepResult, ...]
    max_rate: float | None = None
    addresses: int = 1

    @property
    def met(self) -> bool | None:
        """Whether every step met the objective; of a search, whether any did. None without one."""
        if self.conditions.objective is None:
            return None
        if self.max_rate is not None:
            return self.max_rate > 0
        return all(result.figures.met for result in self.steps)

    @property
    def search_missed(self) -> bool:
        """Whether a rate above max_rate was tried and missed. Otherwise the server may handle more."""
        return self.max_rate is not None and any(result.step.rate > self.max_rate for result in self.steps)

    @property
    def wrong(self) -> int:
        return sum(result.tally.wrong for result in self.steps)

    @property
    def answered(self) -> int:
        return sum(result.tally.ok for result in self.steps)


def encode(run: LoadRun) -> bytes:
    return msgspec.json.format(msgspec.json.encode(run, enc_hook=_to_text), indent=1)


def decode(text: bytes, name: str) -> LoadRun:
    """Raises DocumentError. name: of the file, for the message."""
    try:
        run = msgspec.json.decode(text, type=LoadRun, dec_hook=_from_text)
    except msgspec.DecodeError as error:
        raise DocumentError(f"{name}: not a result of rafaga load: {error}") from None
    if run.schema != SCHEMA:
        raise DocumentError(f"{name}: written as schema {run.schema}; this version reads {SCHEMA}")
    return run


def read(path: Path) -> LoadRun:
    """Raises DocumentError or OSError."""
    return decode(path.read_bytes(), str(path))


def merge(runs: Sequence[LoadRun]) -> LoadRun:
    """The run that these are all parts of. Raises DocumentError, also when a part is missing."""
    first = runs[0]
    missing = set(range(first.part.of))
    for run in runs:
        if run.conditions != first.conditions or [r.step for r in run.steps] != [r.step for r in first.steps]:
            raise DocumentError("these are results of different runs: models, load and seed must be the same")
        if run.part.of != first.part.of or run.part.index not in missing:
            raise DocumentError(f"part {run.part.index + 1}/{run.part.of} is there twice or is of another run")
        missing.remove(run.part.index)
    if missing:
        raise DocumentError(f"missing: {', '.join(f'part {i + 1}/{first.part.of}' for i in sorted(missing))}")
    steps = tuple(_merge_steps(results, first.conditions) for results in zip(*(r.steps for r in runs), strict=True))
    return replace(first, started=min(run.started for run in runs), part=SchedulePart(), steps=steps)


def _merge_steps(results: Sequence[StepResult], conditions: Conditions) -> StepResult:
    first = results[0]
    tally = Tally(first.tally.interval_s)
    for result in results:
        tally.merge(result.tally)
    generators = tuple(use for result in results for use in result.generators)
    figures = Figures.of(first.step, tally, generators, conditions.objective)
    # Every machine scraped the same server: their windows are the same window.
    server = next((result.server for result in results if result.server is not None), None)
    return StepResult(first.step, figures, tally, generators, server)


def judged(run: LoadRun, objective: Objective) -> LoadRun:
    """The same run under another objective. Raises DocumentError for an objective of a model that was not asked."""
    if unknown := objective.by_model.keys() - run.conditions.models.keys():
        raise DocumentError(f"--slo-p99-ms: the run has no model {', '.join(sorted(unknown))}")
    conditions = replace(run.conditions, slo_p99_ms=objective.p99_ms, slo_p99_ms_by_model=objective.by_model)
    steps = tuple(
        replace(r, figures=Figures.of(r.step, r.tally, r.generators, conditions.objective)) for r in run.steps
    )
    return replace(run, conditions=conditions, steps=steps)


def _to_text(value: Any) -> str:
    if isinstance(value, Distribution):
        return value.encode()
    raise NotImplementedError(f"no JSON form of {type(value).__name__}")


def _from_text(kind: type, value: Any) -> Any:
    if kind is Distribution and isinstance(value, str):
        return Distribution.decode(value)
    raise NotImplementedError(f"no JSON form of {kind.__name__}")
