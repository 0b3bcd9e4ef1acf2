"""A discrete-event simulation of one model under load: the real Batcher, simulated engines and time.

It measures the effect of scheduling alone, and predicts the capacity of a replica for `rafaga plan`. Arrivals are
Poisson, open loop: the next request does not wait for an answer. Requests that were not answered within their deadline
do not count, even if they were computed.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

import numpy as np

from rafaga.errors import RafagaError, Refused
from rafaga.priority import Priority
from rafaga.server.scheduling.batcher import Batcher
from rafaga.server.scheduling.job import Arrays, Batch, Job, JobTiming
from rafaga.server.scheduling.latency import LatencyTable, buckets_up_to

_ROW = np.zeros((1, 1), np.uint8)


@dataclass(frozen=True)
class Curve:
    """Seconds per run: fixed_s + rows * row_s, times lognormal noise of mean 1; rarely, a run takes `stall` times as
    long."""

    fixed_s: float
    row_s: float
    noise: float = 0.0
    stall: float = 1.0
    stall_probability: float = 0.0

    def mean(self, rows: int, cost: float = 1.0) -> float:
        return self.fixed_s + rows * cost * self.row_s

    def sample(self, rows: int, cost: float, rng: Random) -> float:
        seconds = self.mean(rows, cost) * rng.lognormvariate(-(self.noise**2) / 2, self.noise)
        return seconds * self.stall if rng.random() < self.stall_probability else seconds

    def table(self, max_batch_size: int = 32, scale: float = 1.0) -> LatencyTable:
        """The latency table that warm-up would have measured, or `scale` times that."""
        buckets = buckets_up_to(max_batch_size)
        return LatencyTable(buckets, [scale * self.mean(b) for b in buckets])

    def peak(self, max_batch_size: int = 32) -> float:
        """Upper bound of the throughput, in rows per second."""
        return max(b / self.mean(b) for b in range(1, max_batch_size + 1))


@dataclass(frozen=True)
class SimulatedRequest:
    """waited_s: before it reached the batcher; counted as part of its latency, not of its deadline."""

    deadline_s: float
    rows: int = 1
    key: int | None = None
    cost: float = 1.0
    waited_s: float = 0.0
    priority: Priority = Priority.NORMAL


@dataclass
class Report:
    """Rows, not requests, of `seconds` under load: `good` were answered in time, `late` after it, `run` computed.

    busy_s: of all engines together. latencies: seconds, of every request that was answered.
    good_of: the same by priority. longest_s: longest time to the answer of an accepted request, by priority.
    """

    seconds: float
    offered: int = 0
    refused: int = 0
    dropped: int = 0
    late: int = 0
    good: int = 0
    run: int = 0
    batches: int = 0
    busy_s: float = 0.0
    latencies: list[float] = field(default_factory=list)
    good_of: Counter[Priority] = field(default_factory=Counter)
    longest_s: dict[Priority, float] = field(default_factory=dict)

    @property
    def goodput(self) -> float:
        return self.good / self.seconds

    @property
    def wasted(self) -> float:
        """Share of the answers that were too late."""
        return self.late / max(1, self.good + self.late)

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.latencies, q))


def poisson(
    rate: float, seconds: float, request: Callable[[Random], SimulatedRequest], rng: Random
) -> Iterator[tuple[float, SimulatedRequest]]:
    now = 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        yield now, request(rng)


def simulate(
    batcher: Batcher,
    sample: Callable[[int, float, Random], float],
    arrivals: Iterator[tuple[float, SimulatedRequest]],
    seconds: float,
    seed: int = 0,
    warm_up_s: float = 0.0,
    ahead: bool = False,
) -> Report:
    """Feeds `arrivals`, in rising order, to `batcher` and its engines, until everything is answered.

    `sample` gives the seconds of a run. Counts only the time from `warm_up_s` to `seconds`. `ahead`: engines take a
    full batch while they run another, like engines whose copies and runs overlap.
    """
    run = _Simulation(batcher, sample, seconds, seed, warm_up_s, ahead)
    arrival = next(arrivals, None)
    while arrival is not None or run.busy:
        if arrival is not None and arrival[0] < run.next_s:
            run.submit(*arrival)
            arrival = next(arrivals, None)
        else:
            run.step()
        run.start_batches()
    return run.report


class _Simulation:
    """One run: the engines, and what they compute. `clock`: simulated seconds."""

    def __init__(
        self,
        batcher: Batcher,
        sample: Callable[[int, float, Random], float],
        seconds: float,
        seed: int,
        warm_up_s: float,
        ahead: bool,
    ) -> None:
        self._batcher = batcher
        self._sample = sample
        self._rng = Random(seed)
        self._window = (warm_up_s, seconds)
        self._ahead = ahead
        self._running: list[tuple[float, int, Batch, float]] = []  # a heap: end, number, batch, seconds of its run
        self._next_of: dict[Batch, Batch] = {}  # taken ahead, by the batch that its engine still runs
        self._number = itertools.count()
        self._wake_at = math.inf
        self.clock = 0.0
        self.report = Report(seconds - warm_up_s)

    @property
    def busy(self) -> bool:
        return bool(self._running) or self._batcher.queued_jobs > 0

    @property
    def next_s(self) -> float:
        """When the next run ends, or the batcher must be called again."""
        return min(self._running[0][0] if self._running else math.inf, self._wake_at)

    def submit(self, at_s: float, request: SimulatedRequest) -> None:
        self.clock = at_s

        def answered(_: Arrays, __: JobTiming) -> None:
            self._answered(job, request)

        def failed(_: RafagaError) -> None:
            raise AssertionError("the simulation counts drops itself")

        rows = _ROW if request.rows == 1 else np.zeros((request.rows, 1), np.uint8)
        deadline = at_s + request.deadline_s
        job = Job((rows,), answered, failed, deadline, request.key, request.cost, request.priority)
        self.report.offered += self._counted * job.rows
        try:
            self._batcher.submit(job, at_s)
        except Refused:
            self.report.refused += self._counted * job.rows

    def step(self) -> None:
        """To `next_s`, where a run may end."""
        self.clock = self.next_s
        if not self._running or self._running[0][0] != self.clock:
            return
        _, _, batch, took = heapq.heappop(self._running)
        self.report.run += self._counted * batch.rows
        self.report.batches += self._counted
        self.report.busy_s += self._counted * took
        for job, start, stop in batch.parts:
            job.answer(start, (job.inputs[0][start:stop],), took, batch.rows)
        self._batcher.finished(batch, took)
        if (following := self._next_of.pop(batch, None)) is not None:
            self._batcher.begun(following, self.clock)
            self._run(following)

    def start_batches(self) -> None:
        """On idle engines, and ahead on busy ones."""
        while len(self._running) < self._batcher.engines and (taken := self._take()) is not None:
            self._run(taken)
        for _, _, batch, _ in self._running if self._ahead else ():
            full = self._batcher.queued_rows >= self._batcher.latency.efficient_rows
            if full and batch not in self._next_of and (taken := self._take(after=batch)) is not None:
                self._next_of[batch] = taken

    @property
    def _counted(self) -> bool:
        return self._window[0] <= self.clock < self._window[1]

    def _take(self, after: Batch | None = None) -> Batch | None:
        decision = self._batcher.take(self.clock, after)
        self.report.dropped += self._counted * sum(job.rows for job in decision.dropped)
        self._wake_at = math.inf if decision.wake_at is None else decision.wake_at
        return decision.batch

    def _run(self, batch: Batch) -> None:
        took = self._sample(batch.rows, batch.cost, self._rng)
        heapq.heappush(self._running, (self.clock + took, next(self._number), batch, took))

    def _answered(self, job: Job, request: SimulatedRequest) -> None:
        if not self._counted:
            return
        report = self.report
        took = self.clock - job.arrival + request.waited_s
        report.latencies.append(took)
        report.longest_s[job.priority] = max(took, report.longest_s.get(job.priority, 0.0))
        if self.clock <= job.deadline:
            report.good += job.rows
            report.good_of[job.priority] += job.rows
        else:
            report.late += job.rows
