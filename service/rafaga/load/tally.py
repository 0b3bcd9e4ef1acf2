"""What happened in the measured window of a step: raw counts, which merge over processes and machines without loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rafaga.load.histogram import Distribution
from rafaga.load.log import OK, UNCHECKED, LogRows

# One per cent is enough for a curve over time, and keeps long runs small.
_CURVE_DIGITS = 2


@dataclass
class _Outcomes:
    """By reason, OK among them."""

    outcomes: dict[str, int] = field(default_factory=dict, kw_only=True)

    @property
    def sent(self) -> int:
        """Requests that were due, whatever their outcome."""
        return sum(self.outcomes.values())

    @property
    def ok(self) -> int:
        return self.outcomes.get(OK, 0)


@dataclass
class Interval(_Outcomes):
    """A slice of the window, by the time requests were due."""

    latency: Distribution = field(default_factory=lambda: Distribution(_CURVE_DIGITS))


@dataclass
class ModelTally(_Outcomes):
    """One model of a mix."""

    latency: Distribution = field(default_factory=Distribution)


@dataclass
class Tally(_Outcomes):
    """Durations are microseconds.

    latency: of answers, from when the request was due. from_send: the same from when it was sent, as generators report
    that start their clock there. unanswered: until a request was refused or failed. lateness: of the generator, from
    due to sent. queue, preprocess, inference: the server's times, from every answer that has them.
    """

    interval_s: float
    latency: Distribution = field(default_factory=Distribution)
    from_send: Distribution = field(default_factory=Distribution)
    unanswered: Distribution = field(default_factory=Distribution)
    lateness: Distribution = field(default_factory=Distribution)
    queue: Distribution = field(default_factory=Distribution)
    preprocess: Distribution = field(default_factory=Distribution)
    inference: Distribution = field(default_factory=Distribution)
    batch_sizes: dict[int, int] = field(default_factory=dict)
    checked: int = 0
    wrong: int = 0
    models: dict[str, ModelTally] = field(default_factory=dict)
    intervals: list[Interval] = field(default_factory=list)

    def add(self, rows: LogRows, duration_s: float, models: Sequence[str]) -> None:
        """Counts the rows that were due in the window. models: of each request of the mix, by its place."""
        due_s = np.frombuffer(rows.due_s)
        window = (due_s >= 0) & (due_s < duration_s)
        if not window.any():
            return
        due_s = due_s[window]
        sent_s, done_s = np.frombuffer(rows.sent_s)[window], np.frombuffer(rows.done_s)[window]
        outcome = np.frombuffer(rows.outcome, np.uint16)[window]
        ok = outcome == 0
        latency_us = (done_s - due_s) * 1e6
        self.latency.record(latency_us[ok])
        self.from_send.record((done_s - sent_s)[ok] * 1e6)
        self.unanswered.record(latency_us[~ok])
        self.lateness.record((sent_s - due_s) * 1e6)
        self._add_outcomes(rows.reasons, outcome, self.outcomes)
        self._add_answers(rows, window)
        which = np.asarray(models)[np.frombuffer(rows.request, np.uint32)[window]]
        for model in np.unique(which).tolist():
            of_model = which == model
            tally = self.models.setdefault(model, ModelTally())
            tally.latency.record(latency_us[of_model & ok])
            self._add_outcomes(rows.reasons, outcome[of_model], tally.outcomes)
        at = (due_s / self.interval_s).astype(int)
        for index in np.unique(at).tolist():
            in_interval = at == index
            interval = self._interval(index)
            interval.latency.record(latency_us[in_interval & ok])
            self._add_outcomes(rows.reasons, outcome[in_interval], interval.outcomes)

    def _add_answers(self, rows: LogRows, window: NDArray[np.bool_]) -> None:
        right = np.frombuffer(rows.right, np.int8)[window]
        self.checked += int((right != UNCHECKED).sum())
        self.wrong += int((right == 0).sum())
        batch_size = np.frombuffer(rows.batch_size, np.uint32)[window]
        told = batch_size > 0
        for distribution, column in (
            (self.queue, rows.queue_us),
            (self.preprocess, rows.preprocess_us),
            (self.inference, rows.inference_us),
        ):
            distribution.record(np.frombuffer(column, np.uint64)[window][told])
        sizes, counts = np.unique(batch_size[told], return_counts=True)
        _merge_counts(self.batch_sizes, dict(zip(sizes.tolist(), counts.tolist(), strict=True)))

    @staticmethod
    def _add_outcomes(reasons: Sequence[str], outcome: NDArray[np.uint16], into: dict[str, int]) -> None:
        counts = np.bincount(outcome, minlength=len(reasons)).tolist()
        _merge_counts(into, {reason: n for reason, n in zip(reasons, counts, strict=True) if n})

    def _interval(self, index: int) -> Interval:
        while len(self.intervals) <= index:
            self.intervals.append(Interval())
        return self.intervals[index]

    def merge(self, other: Tally) -> None:
        """Adds what another process or machine counted in the same step."""
        for name in ("latency", "from_send", "unanswered", "lateness", "queue", "preprocess", "inference"):
            getattr(self, name).merge(getattr(other, name))
        _merge_counts(self.batch_sizes, other.batch_sizes)
        _merge_counts(self.outcomes, other.outcomes)
        self.checked += other.checked
        self.wrong += other.wrong
        for name, theirs in other.models.items():
            ours = self.models.setdefault(name, ModelTally())
            ours.latency.merge(theirs.latency)
            _merge_counts(ours.outcomes, theirs.outcomes)
        for index, interval in enumerate(other.intervals):
            own = self._interval(index)
            own.latency.merge(interval.latency)
            _merge_counts(own.outcomes, interval.outcomes)


def interval_s(duration_s: float) -> float:
    """A round number of seconds that cuts the window into at most 60 slices: enough for a curve, and each with enough
    requests for a p99."""
    if duration_s < 2.5:
        return 0.1
    for candidate in (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0):
        if duration_s / candidate <= 60:
            return candidate
    return duration_s / 60


def _merge_counts(into: dict[Any, int], counts: dict[Any, int]) -> None:
    for key, count in counts.items():
        into[key] = into.get(key, 0) + count
