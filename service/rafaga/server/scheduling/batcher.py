"""Which rows run next: the queue of one model and the choice of its batches.

Pure scheduling without threads, clock, gRPC or ONNX: every method gets the time. `JobQueue` owns the Batcher of a model
and calls it under its lock.

- Work-conserving: an idle engine takes what is queued at once; while it runs, jobs gather.
- Earliest due first. A job is due at its deadline, or `max_queue_wait_s` after its arrival if that is sooner. So jobs
  without a deadline are served in order of arrival, and none waits forever while others with deadlines arrive.
- Priorities: each step down counts like being due `max_queue_wait_s` later. The higher priority goes first until the
  lower has waited that long, then age decides. For every ten rows that higher priorities bring, one more is set aside
  for each lower one, ahead of all: it is served however many of the others arrive.
- Admission: a job without a deadline is refused when its predicted wait exceeds `max_queue_wait_s` (QueueFull). A job
  with a deadline is refused when it would finish in the last part of its time (DeadlineUnreachable). That part is
  larger the less runs keep to their predictions. Without it the queue settles where every answer is slightly late.
- Dropping uses a smaller margin, the spread of the runs: a job that would be late in the next batch, if that is as slow
  as many are, is dropped before any work is spent on it.
- Rows of different lengths share a batch only as far as a fifth of it is padding: the most urgent job goes first, and
  others join in their order, or wait for a batch of their length. A job of rows of many lengths is split so too.
- A batch is as large as what waits, up to the efficient size. When the queue can fill one, no batch is made smaller for
  an urgent job: that would cost the others more than it saves. When it cannot, a smaller batch runs first if that saves
  more rows than the engine could have computed in the meantime.
- A batch may be taken ahead, while the engine runs another: it is judged, and counted, as beginning when that ends.
- An idle engine takes any job whose deadline has not passed, whatever the prediction: only runs correct it.
- A job larger than the room left in a batch is split; its parts run in order and its answer is put together again.
- A job that alone would run for long leaves room: its rows beyond half of `max_queue_wait_s` are due one after the
  other, as if it had half of the engines. If no other job comes, it has them all.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import NamedTuple

from rafaga.errors import DeadlineExceeded, DeadlineUnreachable, Draining, QueueFull
from rafaga.server.scheduling.job import Batch, Job, Part, QueuedWork
from rafaga.server.scheduling.latency import LatencyTable

# Admission's margin as a share of the time left: this, plus the spread of the runs, up to the largest.
_MARGIN, _MAX_MARGIN = 0.1, 0.4
# The work that one job may bring at once, as a share of the longest wait; and the share of the engines for the rest.
_AT_ONCE = 0.5
_SHARE_OF_LONG = 0.5
# One row is set aside for each lower priority for so many rows that higher ones bring.
_ROWS_PER_SHARE = 10
# Of the work of a batch, this share at least is the rows' own; the rest is padding to the longest one.
_USEFUL = 0.8
# Jobs that are looked at for a batch, as a multiple of its rows: those of other lengths are passed over.
_LOOK = 8
# Slots per longest wait, in which the queue's work is added up by due time.
_SLOTS = 256


@dataclass(frozen=True)
class BatchPolicy:
    """max_queue_delay_s: how long to wait for more requests before running a batch; 0: never.

    max_queue_wait_s: a job without a deadline that is predicted to wait longer is refused. max_queue_jobs: of one
    priority and those above it; bounds memory, whatever is predicted.
    """

    max_queue_delay_s: float = 0.0
    max_queue_wait_s: float = 1.0
    max_queue_jobs: int = 4096


class Decision(NamedTuple):
    """The batch to run, or when to ask again (None: once a job arrives); and the jobs that were dropped."""

    batch: Batch | None
    wake_at: float | None
    dropped: tuple[Job, ...]


# A queued job, after its negated due time and sequence number: queues are sorted with the most urgent job last, so that
# taking is popping. A plain tuple compares fastest; no two jobs have the same number.
_Entry = tuple[float, int, Job]


class Batcher:
    """engines: how many take batches now, each as fast as `latency` predicts."""

    def __init__(self, policy: BatchPolicy, latency: LatencyTable, engines: int = 1) -> None:
        self.policy = policy
        self.engines = engines
        self.latency = latency
        self._cap = latency.efficient_rows
        self._queues: dict[Hashable, list[_Entry]] = {}
        self._jobs = 0
        self._jobs_of = [0, 0, 0, 0]  # by level
        self._set_aside = [0, 0, 0, 0]  # rows times _ROWS_PER_SHARE, by priority
        self._rows = 0  # queued and not taken
        self._work = QueuedWork(max(policy.max_queue_wait_s, 1e-3) / _SLOTS)  # of those rows, in seconds
        self._sequence = 0
        self._running: set[Batch] = set()
        self._draining = False

    @property
    def queued_jobs(self) -> int:
        return self._jobs

    @property
    def queued_rows(self) -> int:
        return self._rows

    @property
    def idle(self) -> bool:
        return not self._jobs and not self._running

    def drain(self) -> None:
        """New jobs are refused; the queued ones run."""
        self._draining = True

    def submit(self, job: Job, now: float) -> None:
        """Queues `job`. Raises Draining, QueueFull, DeadlineUnreachable or DeadlineExceeded; its callbacks are then not
        called."""
        if self._draining:
            raise Draining("the server is stopping: send the request to another replica")
        if job.deadline <= now:
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        job.arrival, job.sequence = now, self._sequence
        self._sequence += 1
        if self._set_aside[job.priority] >= _ROWS_PER_SHARE * min(job.rows, self._cap):
            job.level = 0
        job.row_s = self.latency.predict(self._cap, job.cost) / self._cap
        job.due = job.first_due = self._due(job)
        self._spread_out(job, now)
        if not self.idle:
            self._admit(job, now)
        self._share(job)
        insort(self._queues.setdefault(job.key, []), _entry(job))
        self._jobs += 1
        self._jobs_of[job.level] += 1
        self._rows += job.rows
        self._book(job, 0, job.rows)

    def remove(self, job: Job) -> bool:
        """Takes a job out of the queue. False when none of it is queued. Its rows that are in a batch still run."""
        queue = self._queues.get(job.key, [])
        at = bisect_left(queue, _entry(job))
        if at == len(queue) or queue[at][2] is not job:
            return False
        self._discard(queue, at)
        return True

    def remove_all(self) -> list[Job]:
        """Empties the queue; returns the jobs, which the caller must answer."""
        jobs = [job for queue in self._queues.values() for _, _, job in queue]
        self._queues.clear()
        self._work.clear()
        self._jobs = self._rows = 0
        self._jobs_of = [0, 0, 0, 0]
        return jobs

    def predicted_wait(self, job: Job, now: float) -> float:
        """Seconds that `job` would wait for others: the running batches, then everything that is due before it."""
        return self._wait_s(self._ahead_s(job), now)

    def take(self, now: float, after: Batch | None = None) -> Decision:
        """The next batch. An engine calls this when it is free, and `finished` when the batch is done.

        `after`: the engine still runs that batch, and calls `begun` when the new one starts.
        """
        until_then_s = 0.0 if after is None else after.left_s(now)
        now += until_then_s
        dropped: list[Job] = []
        while (queue := self._most_urgent()) is not None:
            jobs = (job for _, _, job in reversed(queue))
            alone = self._jobs == 1 and not self._running
            plan = _plan_batch(jobs, self.latency, self.engines, now, until_then_s, alone)
            if plan.late:
                for job in plan.late:
                    self.remove(job)
                dropped += plan.late
                continue
            head = queue[-1][2]
            # Waiting for more requests must not make this one late.
            ready_at = min(head.arrival + self.policy.max_queue_delay_s, head.deadline - 2 * (plan.end - now))
            if now < ready_at and self._rows < self._cap and not self._draining:
                return Decision(None, ready_at, tuple(dropped))
            batch = self._form(queue, plan.parts, now, ahead=after is not None)
            self._running.add(batch)
            return Decision(batch, None, tuple(dropped))
        return Decision(None, None, tuple(dropped))

    def begun(self, batch: Batch, now: float) -> None:
        """`batch`, which was taken ahead, runs from now on.

        This corrects the prediction: under a load that keeps the engine busy, errors of the predictions would add up.
        """
        for job, start, _ in batch.parts:
            if not start:
                job.queue_s += now - batch.begins
        batch.begins, batch.ahead = now, False

    def finished(self, batch: Batch, seconds: float | None) -> None:
        """`seconds` from taking the batch to its last answer, or None when it failed."""
        self._running.discard(batch)
        if seconds is not None:
            self.latency.observe(batch.rows, seconds, batch.cost)

    @property
    def _margin(self) -> float:
        return min(_MARGIN + self.latency.spread, _MAX_MARGIN)

    def _due(self, job: Job) -> float:
        step_s = self.policy.max_queue_wait_s
        return min(job.deadline, job.arrival + step_s) + job.level * step_s

    def _spread_out(self, job: Job, now: float) -> None:
        """Spreads the rows of a job that takes long, as far as its deadline allows, so that others run between them."""
        if job.rows <= self._cap:
            return
        row_s = job.row_s / self.engines
        at_once = max(self._cap, int(_AT_ONCE * self.policy.max_queue_wait_s / row_s))
        if (later := job.rows - at_once) > 0:
            spare_s = (job.deadline - now) * (1 - self._margin) - self.policy.max_queue_wait_s
            job.at_once = at_once
            job.pace_s = max(0.0, min(later * row_s / _SHARE_OF_LONG, spare_s)) / later

    def _wait_s(self, ahead_s: float, now: float) -> float:
        left = [b.left_s(now) for b in self._running if not b.ahead]
        # The first engine to be free. More may run than there are engines: a lost one until its run ends.
        running = 0.0 if len(left) < self.engines else sorted(left)[-self.engines]
        taken = sum(b.seconds for b in self._running if b.ahead)
        return running + (taken + ahead_s) / self.engines

    def _ahead_s(self, job: Job) -> float:
        """Seconds of work that is due before the last row of `job`."""
        return self._work.before(self._due(job) + max(0, job.rows - job.at_once) * job.pace_s)

    def _book(self, job: Job, start: int, stop: int, sign: int = 1) -> None:
        """Adds rows to the queued work by when they are due, or with `sign` -1 subtracts them."""
        together = stop if not job.pace_s else max(start, min(stop, job.at_once))
        if together > start:
            self._work.add(job.first_due, sign * (together - start) * job.row_s)
        for row in range(together, stop):
            self._work.add(job.due_of(row), sign * job.row_s)

    def _share(self, job: Job) -> None:
        """Sets rows aside for lower priorities, up to a batch; subtracts those of a job that uses them."""
        if not job.level:
            self._set_aside[job.priority] -= _ROWS_PER_SHARE * job.rows
        for lower in range(job.priority + 1, len(self._set_aside)):
            self._set_aside[lower] = min(self._set_aside[lower] + job.rows, _ROWS_PER_SHARE * self._cap)

    def _admit(self, job: Job, now: float) -> None:
        ahead_s = self._ahead_s(job)
        wait = self._wait_s(ahead_s, now)
        full_s = self._cap * job.row_s
        if sum(self._jobs_of[: job.level + 1]) >= self.policy.max_queue_jobs:
            raise QueueFull("the queue is full: retry later", max(wait, full_s))
        if job.deadline == math.inf:
            over = wait - self.policy.max_queue_wait_s
            if over > 0:
                raise QueueFull(
                    f"expected a wait below {self.policy.max_queue_wait_s:.3f} s, predicted {wait:.3f} s: "
                    "set a deadline to wait longer, or retry later",
                    max(over, full_s),
                )
            return
        left = (job.deadline - now) * (1 - self._margin)
        takes = self._predicted_finish(job, ahead_s, wait)
        if takes > left:
            # A retry can only help if the queue is what takes the time.
            retry_after_s = max(takes - left, full_s) if self.latency.efficient_s(job.rows, job.cost) <= left else None
            raise DeadlineUnreachable(
                f"{job.deadline - now:.3f} s are left, the answer is predicted to take {takes:.3f} s", retry_after_s
            )

    def _predicted_finish(self, job: Job, ahead_s: float, wait: float) -> float:
        """Seconds to the answer. More jobs will arrive before the batch is formed, so it is assumed to be at least as
        large as the ones that run."""
        ahead = round(ahead_s / job.row_s)
        batches, others = divmod(ahead + job.rows - 1, self._cap)
        like = max((b.rows for b in self._running), default=1)
        last = max(others + 1, min(like, self._cap))
        work_ahead_s = ahead * job.row_s / self.engines
        whole_s = batches * self._cap * job.row_s / self.engines
        return wait - work_ahead_s + whole_s + self.latency.predict(last, job.cost)

    def _most_urgent(self) -> list[_Entry] | None:
        if len(self._queues) == 1:
            return next(iter(self._queues.values()))
        return max(self._queues.values(), key=lambda q: q[-1], default=None)

    def _form(self, queue: list[_Entry], parts: Sequence[Part], now: float, ahead: bool) -> Batch:
        for job, start, stop in parts:
            at = len(queue) - 1 if queue[-1][2] is job else bisect_left(queue, _entry(job))
            if not start:
                job.queue_s = now - job.arrival
            job.taken = stop
            self._rows -= stop - start
            self._book(job, start, stop, -1)
            if not job.rest:
                self._discard(queue, at)
            elif job.pace_s:
                del queue[at]
                job.due = job.due_of(stop)
                insort(queue, _entry(job))
        rows, cost = _size(parts)
        return Batch(tuple(parts), rows, cost, now, self.latency.predict(rows, cost), ahead)

    def _discard(self, queue: list[_Entry], at: int) -> None:
        job = queue.pop(at)[2]
        self._jobs -= 1
        self._jobs_of[job.level] -= 1
        if job.rest:
            self._rows -= job.rest
            self._book(job, job.taken, job.rows, -1)
        if not queue:
            del self._queues[job.key]
        if not self._jobs:
            self._work.clear()  # so that rounding errors do not add up


def _entry(job: Job) -> _Entry:
    return (-job.due, -job.sequence, job)


class _BatchPlan(NamedTuple):
    """The next batch, which ends at `end`. late: jobs to drop before a batch is formed."""

    parts: Sequence[Part]
    end: float
    late: tuple[Job, ...] = ()


def _plan_batch(
    queued: Iterable[Job], latency: LatencyTable, engines: int, now: float, until_then_s: float, alone: bool
) -> _BatchPlan:
    """`queued`: the most urgent first, at least one. `now` lies `until_then_s` in the future, when the engine's current
    run ends; that may take longer than predicted too. `alone`: a single job is queued and nothing runs."""
    cap = latency.efficient_rows
    parts: list[Part] = []
    rows, work, cost, first_deadline, whole = 0, 0.0, 0.0, math.inf, True
    for job in islice(queued, _LOOK * cap):
        count, joined = _joining(job, cap - rows, rows, work, cost)
        if not count:
            continue
        parts.append(Part(job, job.taken, job.taken + count))
        rows, work, cost = rows + count, joined, max(cost, job.cost_of(job.taken))
        whole = whole and count == job.rest
        first_deadline = min(first_deadline, job.deadline)
        if rows == cap:
            break
    run_s = latency.predict(rows, cost)
    end, slack_s = now + run_s, (until_then_s + run_s) * min(latency.spread, _MAX_MARGIN)
    if first_deadline >= end + slack_s and whole:
        return _BatchPlan(parts, end)
    if alone and not parts[0].start and now < first_deadline:
        return _BatchPlan(parts, end)  # only a run can correct the prediction
    late: list[Job] = []
    for job, _, stop in parts:
        # A job that does not fit into the batch as a whole continues in the next ones.
        rest_s = latency.efficient_s(job.rows - stop, job.cost)
        last = end if stop == job.rows else max(end, now + (run_s + rest_s) / engines)
        if last + slack_s > job.deadline:
            late.append(job)
    if late and rows < cap:
        in_time = _in_time(parts, latency, now)
        smaller_rows, smaller_cost = _size(in_time)
        smaller_s = latency.predict(smaller_rows, smaller_cost)
        saved = sum(stop - start for job, start, stop in in_time if job in late)
        if saved > smaller_s * rows / run_s - smaller_rows:
            return _BatchPlan(in_time, now + smaller_s)
    return _BatchPlan(parts, end, tuple(late))


def _joining(job: Job, most: int, rows: int, work: float, cost: float) -> tuple[int, float]:
    """How many of the next rows of `job`, at most `most`, may join others, and the work of all of them then. The
    others: `rows` of a total `work`, the largest of which is `cost`."""
    useful = _USEFUL * max(cost, job.cost_of(job.taken))
    if not job.costs:  # its rows cost the same: all that there is room for, or none
        count = min(job.rest, most)
        work += count * job.cost
        return (count, work) if work >= useful * (rows + count) else (0, work)
    works = accumulate(job.costs[job.taken : job.taken + most], initial=work)
    return max(((n, joined) for n, joined in enumerate(works) if joined >= useful * (rows + n)), default=(0, work))


def _size(parts: Sequence[Part]) -> tuple[int, float]:
    """Of a batch: its rows, and the cost of the largest."""
    rows = sum(part.stop - part.start for part in parts)
    return rows, max((part.job.cost_of(part.start) for part in parts), default=1.0)


def _in_time(parts: Sequence[Part], latency: LatencyTable, now: float) -> Sequence[Part]:
    """As many of the most urgent `parts` as can share a batch that completes their jobs and in which none is late."""
    for count in range(len(parts) - 1, 0, -1):
        end = now + latency.predict(*_size(parts[:count]))
        if all(end <= job.deadline and stop == job.rows for job, _, stop in parts[:count]):
            return parts[:count]
    return []
