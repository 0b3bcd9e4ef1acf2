"""Which rows run next: the queue of one model and the choice of its batches.

Pure scheduling, with no thread, clock, gRPC or ONNX in it: every method is told the time. `ServedModel` owns the one
Batcher of a model and calls it under its lock.

- Work-conserving: an idle engine takes what is there at once; while it runs, jobs gather.
- Earliest deadline first. Jobs without a deadline are ordered as if they had one `PATIENCE_S` after arrival, so that
  they are served in order of arrival and never starve.
- Bounded in time: a job is refused when its predicted wait passes `max_queue_wait_s` (QueueFull), or when it would
  finish after its deadline (DeadlineUnreachable). What became hopeless while queued is dropped when a batch is formed,
  before any work is spent on it.
- A batch is never larger than what keeps the most urgent job in it on time, nor than what is efficient.
- A job larger than the room left in a batch is split; its parts run in order and its answer is put together again.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rafaga.errors import DeadlineExceeded, DeadlineUnreachable, Draining, QueueFull, RafagaError
from rafaga.server.latency import LatencyTable

PATIENCE_S = 60.0

Arrays = tuple[NDArray[np.generic], ...]


@dataclass(frozen=True)
class BatchPolicy:
    """max_queue_delay_s: how long an idle engine waits for company; 0 never waits.

    max_queue_wait_s: a job predicted to wait longer is refused. max_queue_jobs bounds memory, whatever is predicted.
    """

    max_queue_delay_s: float = 0.0
    max_queue_wait_s: float = 1.0
    max_queue_jobs: int = 4096


class JobTiming(NamedTuple):
    """Seconds, and the rows of the (largest) batch the job was part of."""

    queue_s: float
    inference_s: float
    batch_size: int


class Job:
    """One caller's rows on their way through a model. Exactly one of the two callbacks is called, once.

    inputs: one array per input of the model, each [rows, ...]. key: only jobs of equal key share a batch. cost: work
    per row, relative to the warm-up inputs. deadline: monotonic seconds, or infinity.
    """

    __slots__ = (
        "_outputs",
        "arrival",
        "batch_size",
        "cost",
        "deadline",
        "finished",
        "inference_s",
        "inputs",
        "key",
        "on_failure",
        "on_success",
        "pending",
        "queue_s",
        "rows",
        "sequence",
        "taken",
    )

    def __init__(
        self,
        inputs: Arrays,
        on_success: Callable[[Arrays, JobTiming], None],
        on_failure: Callable[[RafagaError], None],
        deadline: float = math.inf,
        key: Hashable = None,
        cost: float = 1.0,
    ) -> None:
        self.inputs = inputs
        self.rows = len(inputs[0])
        self.on_success = on_success
        self.on_failure = on_failure
        self.deadline = deadline
        self.key = key
        self.cost = cost
        self.arrival = 0.0
        self.sequence = 0
        self.taken = 0  # rows handed out in batches
        self.pending = self.rows  # rows not answered
        self.queue_s = 0.0
        self.inference_s = 0.0
        self.batch_size = 0
        self.finished = False
        self._outputs: Arrays | None = None

    def fail(self, error: RafagaError) -> None:
        if not self.finished:
            self.finished = True
            self.on_failure(error)

    def abandon(self) -> None:
        """The caller went away: no callback any more."""
        self.finished = True

    def answer(self, start: int, outputs: Arrays, inference_s: float, batch_size: int) -> None:
        """Takes the outputs of rows [start, start + len); the last part completes the job."""
        self.inference_s += inference_s
        self.batch_size = max(self.batch_size, batch_size)
        count = len(outputs[0])
        self.pending -= count
        if self.finished:
            return
        if count == self.rows:
            whole = outputs
        else:
            if self._outputs is None:
                self._outputs = tuple(np.empty((self.rows, *o.shape[1:]), o.dtype) for o in outputs)
            for kept, part in zip(self._outputs, outputs, strict=True):
                kept[start : start + count] = part
            if self.pending:
                return
            whole = self._outputs
        self.finished = True
        self.on_success(whole, JobTiming(self.queue_s, self.inference_s, self.batch_size))


class Part(NamedTuple):
    """Rows [start, stop) of a job."""

    job: Job
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Batch:
    parts: tuple[Part, ...]
    rows: int
    cost: float
    predicted_end: float


class Decision(NamedTuple):
    """What `take` decided: the batch to run, or when to ask again (None: once something arrives); who was dropped."""

    batch: Batch | None
    wake_at: float | None
    dropped: tuple[Job, ...]


class _Entry(NamedTuple):
    """A queued job. The list is kept most urgent last, so that taking is popping: hence the negated order."""

    order: tuple[float, int]
    job: Job


class Batcher:
    def __init__(self, policy: BatchPolicy, latency: LatencyTable) -> None:
        self.policy = policy
        self.latency = latency
        self._queues: dict[Hashable, list[_Entry]] = {}
        self._jobs = 0
        self._rows = 0  # queued and not yet taken
        self._work = 0.0  # the same, weighted by cost
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
        """From now on every job is refused; what is queued still runs."""
        self._draining = True

    def submit(self, job: Job, now: float) -> None:
        """Queues `job`. Raises Draining, QueueFull, DeadlineUnreachable or DeadlineExceeded; its callbacks are then not
        called."""
        if self._draining:
            raise Draining("the server is stopping: send the request to another replica")
        if job.deadline <= now:
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        job.arrival = now
        job.sequence = self._sequence
        # An idle engine takes any job: predictions are corrected by runs, and refusing all would never correct them.
        if not self.idle:
            self._admit(job, now)
        self._sequence += 1
        insort(self._queues.setdefault(job.key, []), _entry(job))
        self._count(job, 1)

    def remove(self, job: Job) -> None:
        """Takes a job out whose caller went away. Rows already in a batch run to their end."""
        queue = self._queues.get(job.key, [])
        entry = _entry(job)
        at = bisect_left(queue, entry.order, key=lambda e: e.order)
        if at < len(queue) and queue[at].job is job:
            self._discard(queue, at)

    def remove_all(self) -> list[Job]:
        """Empties the queue, for a model that stops serving; returns the jobs, which the caller owes an answer."""
        jobs = [entry.job for queue in self._queues.values() for entry in queue]
        self._queues.clear()
        self._jobs, self._rows, self._work = 0, 0, 0.0
        return jobs

    def predicted_wait(self, job: Job, now: float) -> float:
        """Seconds until `job` would be taken: the running batches, then everything more urgent."""
        running = max((b.predicted_end for b in self._running), default=now)
        cap = self._cap()
        return max(0.0, running - now) + self._work_ahead(job) / cap * self.latency.predict(cap)

    def take(self, now: float) -> Decision:
        """The next batch. An engine calls this when it is free, and `finished` when the batch is done."""
        dropped: list[Job] = []
        while (queue := self._most_urgent()) is not None:
            head = queue[-1].job
            limit = self._rows_in_time(head, queue, now)
            if head.finished or limit == 0:
                self._discard(queue, len(queue) - 1)
                if not head.finished:
                    dropped.append(head)
                continue
            ready_at = head.arrival + self.policy.max_queue_delay_s
            if now < ready_at and self._rows < self._cap() and not self._draining:
                return Decision(None, ready_at, tuple(dropped))
            batch = self._form(queue, limit, now)
            self._running.add(batch)
            return Decision(batch, None, tuple(dropped))
        return Decision(None, None, tuple(dropped))

    def finished(self, batch: Batch, seconds: float | None) -> None:
        """`seconds` that the run took, or None when it failed."""
        self._running.discard(batch)
        if seconds is not None:
            self.latency.observe(batch.rows, seconds, batch.cost)

    def _admit(self, job: Job, now: float) -> None:
        if self._jobs >= self.policy.max_queue_jobs:
            raise QueueFull("the queue is full: retry later", self.predicted_wait(job, now))
        wait = self.predicted_wait(job, now)
        if wait > self.policy.max_queue_wait_s:
            raise QueueFull(
                f"expected a wait below {self.policy.max_queue_wait_s:.3f} s, predicted {wait:.3f} s: retry later",
                wait - self.policy.max_queue_wait_s,
            )
        finish = now + wait + self.latency.predict(min(job.rows, self._cap()), job.cost)
        if finish > job.deadline:
            raise DeadlineUnreachable(
                f"{job.deadline - now:.3f} s are left, the answer is predicted to take {finish - now:.3f} s", wait
            )

    def _work_ahead(self, job: Job) -> float:
        """Queued rows more urgent than `job`, weighted by cost; by its place in line when there are many."""
        if not self._jobs:
            return 0.0
        order = _entry(job).order
        ahead = sum(len(q) - bisect_left(q, order, key=lambda e: e.order) for q in self._queues.values())
        return self._work * ahead / self._jobs

    def _cap(self) -> int:
        return min(self.latency.buckets[-1], self.latency.efficient_rows)

    def _most_urgent(self) -> list[_Entry] | None:
        return max(self._queues.values(), key=lambda q: q[-1].order, default=None)

    def _rows_in_time(self, head: Job, queue: list[_Entry], now: float) -> int:
        """How many rows may run together with `head` so that it is on time; 0 when it is hopeless.

        When enough is waiting to fill an efficient batch, a head that would only be on time in a smaller one is given
        up: saving it would cost the others more than it is worth.
        """
        cap = self._cap()
        if head.deadline == math.inf:
            return cap
        if now >= head.deadline:
            return 0
        if self._jobs == 1 and not self._running:
            return cap  # nobody else waits: try, whatever the prediction says
        waiting = min(cap, sum(e.job.rows - e.job.taken for e in queue[-cap:]))
        left = head.deadline - now
        if self.latency.predict(waiting, head.cost) <= left:
            return cap
        in_time = max((b for b in self.latency.buckets if self.latency.predict(b, head.cost) <= left), default=0)
        return in_time if 2 * in_time >= waiting else 0

    def _form(self, queue: list[_Entry], limit: int, now: float) -> Batch:
        parts: list[Part] = []
        rows, cost = 0, 0.0
        while queue and rows < limit:
            job = queue[-1].job
            if job.finished:
                self._discard(queue, len(queue) - 1)
                continue
            start = job.taken
            count = min(job.rows - start, limit - rows)
            if not start:
                job.queue_s = now - job.arrival
            job.taken = start + count
            self._rows -= count
            self._work -= count * job.cost
            parts.append(Part(job, start, job.taken))
            rows += count
            cost = max(cost, job.cost)
            if job.taken == job.rows:
                queue.pop()
                self._jobs -= 1
        self._forget_if_empty(queue, parts[-1].job.key)
        return Batch(tuple(parts), rows, cost, now + self.latency.predict(rows, cost))

    def _discard(self, queue: list[_Entry], at: int) -> None:
        job = queue.pop(at).job
        self._count(job, -1)
        self._forget_if_empty(queue, job.key)

    def _forget_if_empty(self, queue: list[_Entry], key: Hashable) -> None:
        if not queue:
            self._queues.pop(key, None)
        if not self._jobs:
            self._work = 0.0  # rounding must not pile up

    def _count(self, job: Job, sign: int) -> None:
        left = job.rows - job.taken
        self._jobs += sign
        self._rows += sign * left
        self._work += sign * left * job.cost


def _entry(job: Job) -> _Entry:
    due = min(job.deadline, job.arrival + PATIENCE_S)
    return _Entry((-due, -job.sequence), job)
