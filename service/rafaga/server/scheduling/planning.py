"""How many of the most urgent rows the next batch takes, and which jobs would be late in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rafaga.server.scheduling.job import Job
from rafaga.server.scheduling.latency import LatencyTable

MAX_MARGIN = 0.4
"""The largest share of a prediction that is added for safety."""


class BatchPlan(NamedTuple):
    """The next batch: `rows` from the most urgent on, ending at `end`. late: jobs to drop before a batch is formed."""

    rows: int
    end: float
    late: tuple[Job, ...] = ()


def plan_batch(
    queued: Iterable[Job], latency: LatencyTable, engines: int, now: float, until_then_s: float, alone: bool
) -> BatchPlan:
    """`queued`: the most urgent first, at least one. `now` lies `until_then_s` in the future, when the engine's current
    run ends; that may take longer than predicted too. `alone`: a single job is queued and nothing runs."""
    cap = latency.efficient_rows
    jobs: list[Job] = []
    rows, cost, first_deadline = 0, 0.0, math.inf
    for job in queued:
        jobs.append(job)
        rows += job.rest
        cost = max(cost, job.cost)
        first_deadline = min(first_deadline, job.deadline)
        if rows >= cap:
            break
    full, rows_all, rows = rows >= cap, rows, min(rows, cap)
    run_s = latency.predict(rows, cost)
    end, slack_s = now + run_s, (until_then_s + run_s) * min(latency.spread, MAX_MARGIN)
    if first_deadline >= end + slack_s and rows_all == rows:
        return BatchPlan(rows, end)
    if alone and not jobs[0].taken and now < first_deadline:
        return BatchPlan(rows, end)  # only a run can correct the prediction
    late: list[Job] = []
    before = 0
    for job in jobs:
        before += job.rest
        # A job that does not fit into the batch as a whole continues in the next ones.
        last = end if before <= cap else max(end, now + latency.efficient_s(before, job.cost) / engines)
        if last + slack_s > job.deadline:
            late.append(job)
    if late and not full:
        in_time = _in_time(jobs, latency, now)
        smaller = BatchPlan(sum(job.rest for job in in_time), now + _batch_s(in_time, latency))
        saved = sum(job.rest for job in late if job in in_time)
        if saved > (smaller.end - now) * rows / (end - now) - smaller.rows:
            return smaller
    return BatchPlan(rows, end, tuple(late))


def _in_time(jobs: Sequence[Job], latency: LatencyTable, now: float) -> Sequence[Job]:
    """As many of the most urgent `jobs` as can share a batch in which none is late."""
    for count in range(len(jobs) - 1, 0, -1):
        end = now + _batch_s(jobs[:count], latency)
        if all(end <= job.deadline for job in jobs[:count]):
            return jobs[:count]
    return []


def _batch_s(jobs: Sequence[Job], latency: LatencyTable) -> float:
    rows, cost = sum(job.rest for job in jobs), max((job.cost for job in jobs), default=1.0)
    return latency.predict(rows, cost)
