"""The results of a tally, for people and CI. All of them can be computed again from the raw counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rafaga.errors import Refused
from rafaga.load.histogram import Distribution
from rafaga.load.log import OK
from rafaga.load.steps import Step
from rafaga.load.tally import Tally

# A process busier than this has no slack left to send in time.
MAX_CORES_PER_PROCESS = 0.7
# Lateness is part of the latency that is reported. Past both bounds it is a good part of it.
MAX_LATENESS_MS = 1.0
MAX_LATENESS_SHARE = 0.1


@dataclass(frozen=True)
class Latency:
    """Milliseconds."""

    count: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    p99_9_ms: float
    max_ms: float

    @classmethod
    def of(cls, distribution: Distribution) -> Latency:
        p50, p90, p95, p99, p99_9 = (us / 1e3 for us in distribution.percentiles_us((50, 90, 95, 99, 99.9)))
        return cls(distribution.count, distribution.mean_us / 1e3, p50, p90, p95, p99, p99_9, distribution.max_us / 1e3)


@dataclass(frozen=True)
class Objective:
    """99 of 100 requests that were due are answered within p99_ms, for each model separately: the mix would hide a rare
    model. Refusals do not count as answers. by_model: bounds of models with their own. p99_ms: bound of all others;
    None without one.
    """

    p99_ms: float | None = None
    by_model: dict[str, float] = field(default_factory=dict)

    def of(self, model: str) -> float | None:
        return self.by_model.get(model, self.p99_ms)

    def __str__(self) -> str:
        bounds = [*(f"{name} within {ms:g} ms" for name, ms in self.by_model.items())]
        if self.p99_ms is not None:
            bounds.insert(0, f"within {self.p99_ms:g} ms")
        return ", ".join(bounds)


@dataclass(frozen=True)
class Judged:
    """A model and its objective. within: how many of the requests that were due were answered within p99_ms."""

    model: str
    p99_ms: float
    due: int
    within: int

    @property
    def met(self) -> bool:
        # Not the p99 of the answers alone: requests without an answer would not count.
        return self.within >= 0.99 * self.due


@dataclass(frozen=True)
class GeneratorUse:
    """One process of the generator during the window. cores: its CPU seconds per second."""

    cores: float


@dataclass(frozen=True)
class Figures:
    """Rates are requests per second of the window.

    goodput: answers within the objective, or all answers without one. met: None without an objective. judged: the
    models that have one.
    """

    offered: float
    answered: float
    goodput: float
    met: bool | None
    latency: Latency
    from_send: Latency
    unanswered: Latency
    lateness: Latency
    queue: Latency
    preprocess: Latency
    inference: Latency
    mean_batch_size: float
    refused: int
    failed: int
    checked: int
    wrong: int
    generator_cores: float  # of the busiest process
    warnings: tuple[str, ...]
    judged: tuple[Judged, ...] = ()

    @classmethod
    def of(cls, step: Step, tally: Tally, generators: tuple[GeneratorUse, ...], objective: Objective | None) -> Figures:
        judged = () if objective is None else tuple(_judge(tally, objective))
        late = sum(tally.models[each.model].ok - each.within for each in judged)
        refused = sum(n for reason, n in tally.outcomes.items() if reason in REFUSALS)
        answers = sum(tally.batch_sizes.values())
        rows = sum(size * n for size, n in tally.batch_sizes.items())
        latency, lateness = Latency.of(tally.latency), Latency.of(tally.lateness)
        cores = max((use.cores for use in generators), default=0.0)
        return cls(
            offered=tally.sent / step.duration_s,
            answered=tally.ok / step.duration_s,
            goodput=(tally.ok - late) / step.duration_s,
            met=None if objective is None else bool(judged) and all(each.met for each in judged),
            latency=latency,
            from_send=Latency.of(tally.from_send),
            unanswered=Latency.of(tally.unanswered),
            lateness=lateness,
            queue=Latency.of(tally.queue),
            preprocess=Latency.of(tally.preprocess),
            inference=Latency.of(tally.inference),
            mean_batch_size=rows / answers if answers else 0.0,
            refused=refused,
            failed=tally.sent - tally.ok - refused,
            checked=tally.checked,
            wrong=tally.wrong,
            generator_cores=cores,
            warnings=tuple(_bottleneck(step, cores, latency, lateness)),
            judged=judged,
        )


def _judge(tally: Tally, objective: Objective) -> Iterator[Judged]:
    """Models without a due request are not judged."""
    for model, of_model in sorted(tally.models.items()):
        if (p99_ms := objective.of(model)) is not None:
            yield Judged(model, p99_ms, of_model.sent, of_model.latency.at_most(p99_ms * 1e3))


def _bottleneck(step: Step, cores: float, latency: Latency, lateness: Latency) -> Iterator[str]:
    """Reasons why the generator may have been measured instead of the server."""
    if cores > MAX_CORES_PER_PROCESS:
        yield f"a generator process used {cores:.0%} of a core"
    if step.open and lateness.p99_ms > max(MAX_LATENESS_MS, MAX_LATENESS_SHARE * latency.p99_ms):
        yield f"requests were sent {lateness.p99_ms:.1f} ms late at p99"


REMEDY = "the generator may have been the bottleneck, not the server: use more --processes, or more machines (--part)"
"""The advice for every warning."""


def _reasons(cls: type[Refused]) -> Iterator[str]:
    yield cls.reason
    for sub in cls.__subclasses__():
        yield from _reasons(sub)


REFUSALS = frozenset(_reasons(Refused))
"""Reasons of requests that the server turned away before any work was done."""


def describe_outcomes(outcomes: dict[str, int]) -> str:
    """Everything but OK, the most frequent first: "QUEUE_FULL 12, DEADLINE_EXCEEDED 3"."""
    bad = sorted(((n, reason) for reason, n in outcomes.items() if reason != OK), reverse=True)
    return ", ".join(f"{reason} {n}" for n, reason in bad)
