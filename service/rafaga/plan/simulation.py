"""A discrete-event simulation of one model under load: the real Batcher, pretended engines, simulated time.

It measures what the scheduling alone is worth, and tells `rafaga plan` what a replica can take. Arrivals are Poisson,
open loop: nobody waits for an answer before sending the next request. Every request that was not answered within its
deadline counts for nothing, whatever was computed for it.
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
from rafaga.server.scheduling.batcher import Batch, Batcher
from rafaga.server.scheduling.job import Arrays, Job, JobTiming
from rafaga.server.scheduling.latency import LatencyTable, buckets_up_to

_ROW = np.zeros((1, 1), np.uint8)


@dataclass(frozen=True)
class Curve:
    """Seconds per run: fixed_s + rows * row_s, times lognormal noise of mean 1; now and then a run takes `stall` times
    as long."""

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
        """What warm-up would have measured, or `scale` times that."""
        buckets = buckets_up_to(max_batch_size)
        return LatencyTable(buckets, [scale * self.mean(b) for b in buckets])

    def peak(self, max_batch_size: int = 32) -> float:
        """Rows per second that no scheduling can pass."""
        return max(b / self.mean(b) for b in range(1, max_batch_size + 1))


@dataclass(frozen=True)
class Request:
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
    good_of: the same by priority. longest_s: an accepted request of each priority took to its answer.
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
        """Share of the answers that came too late."""
        return self.late / max(1, self.good + self.late)

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.latencies, q))


def poisson(
    rate: float, seconds: float, request: Callable[[Random], Request], rng: Random
) -> Iterator[tuple[float, Request]]:
    now = 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        yield now, request(rng)


def simulate(
    batcher: Batcher,
    sample: Callable[[int, float, Random], float],
    arrivals: Iterator[tuple[float, Request]],
    seconds: float,
    seed: int = 0,
    warm_up_s: float = 0.0,
    ahead: bool = False,
) -> Report:
    """Feeds `arrivals`, in rising order, to `batcher` and its engines, until everything is answered.

    `sample` gives the seconds of a run. Only what happens from `warm_up_s` to `seconds` is counted. `ahead`: engines
    take a full batch while they run another, as those do whose copies and runs overlap.
    """
    rng = Random(seed)
    report = Report(seconds - warm_up_s)
    clock = 0.0
    running: list[tuple[float, int, Batch, float]] = []  # a heap: when it ends, which one it is, what it took
    next_of: dict[Batch, Batch] = {}  # taken ahead, by what its engine still runs
    number = itertools.count()
    wake_at = math.inf
    arrival = next(arrivals, None)

    def counted() -> bool:
        return warm_up_s <= clock < seconds

    def run(batch: Batch) -> None:
        took = sample(batch.rows, batch.cost, rng)
        heapq.heappush(running, (clock + took, next(number), batch, took))

    def take(after: Batch | None = None) -> Batch | None:
        nonlocal wake_at
        decision = batcher.take(clock, after)
        report.dropped += counted() * sum(job.rows for job in decision.dropped)
        wake_at = math.inf if decision.wake_at is None else decision.wake_at
        return decision.batch

    def submit(request: Request) -> None:
        def answered(_: Arrays, __: JobTiming) -> None:
            if counted():
                took = clock - job.arrival + request.waited_s
                report.latencies.append(took)
                report.longest_s[job.priority] = max(took, report.longest_s.get(job.priority, 0.0))
                if clock <= job.deadline:
                    report.good += job.rows
                    report.good_of[job.priority] += job.rows
                else:
                    report.late += job.rows

        def failed(_: RafagaError) -> None:
            raise AssertionError("the simulation counts drops itself")

        rows = _ROW if request.rows == 1 else np.zeros((request.rows, 1), np.uint8)
        deadline = clock + request.deadline_s
        job = Job((rows,), answered, failed, deadline, request.key, request.cost, request.priority)
        report.offered += counted() * job.rows
        try:
            batcher.submit(job, clock)
        except Refused:
            report.refused += counted() * job.rows

    while arrival is not None or running or batcher.queued_jobs:
        end = min(running[0][0] if running else math.inf, wake_at)
        if arrival is not None and arrival[0] < end:
            clock = arrival[0]
            submit(arrival[1])
            arrival = next(arrivals, None)
        else:
            clock = end
            if running and running[0][0] == end:
                _, _, batch, took = heapq.heappop(running)
                report.run += counted() * batch.rows
                report.batches += counted()
                report.busy_s += counted() * took
                for job, start, stop in batch.parts:
                    job.answer(start, (job.inputs[0][start:stop],), took, batch.rows)
                batcher.finished(batch, took)
                if (following := next_of.pop(batch, None)) is not None:
                    batcher.begun(following, clock)
                    run(following)
        while len(running) < batcher.engines and (taken := take()) is not None:
            run(taken)
        for _, _, batch, _ in running if ahead else ():
            full = batcher.queued_rows >= batcher.latency.efficient_rows
            if full and batch not in next_of and (taken := take(after=batch)) is not None:
                next_of[batch] = taken
    return report
