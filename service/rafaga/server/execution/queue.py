"""The queue of one model, shared by the threads that submit jobs and the engines that take batches."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from rafaga.errors import DeadlineExceeded, Draining, ModelNotReady, RafagaError
from rafaga.server.observability.metrics import ModelMetrics
from rafaga.server.scheduling.batcher import Batcher, Decision
from rafaga.server.scheduling.job import Batch, Job

_LOG = logging.getLogger(__name__)

DOWN = "the model's engine was lost and is being restarted: ask another replica, or try later"

QUICK_S = 3e-3
"""Batches up to this length may run in the thread that submits the jobs: waking another thread takes long too."""


class JobQueue:
    """A Batcher behind a lock. `batcher` and methods that say so need the lock held; other methods take it.

    inline: whether the thread that submits jobs may run quick batches. direct: whether it may hand a lone row to the
    engine, which runs it in a thread of its own. down: all engines were lost, and none is restarted yet. stopping:
    engines stop after their current batch.
    """

    def __init__(
        self, batcher: Batcher, metrics: ModelMetrics, name: str, *, inline: bool, direct: bool = False
    ) -> None:
        self.batcher = batcher
        self._metrics = metrics
        self._name = name
        self.lock = threading.Lock()  # used directly: entering a Condition is two calls in Python
        self._changed = threading.Condition(self.lock)
        # A full batch waits, or one was completed: for engines that can prepare another batch while one runs.
        self._ripe = threading.Condition(self.lock)
        self._looking_ahead = 0  # engines that wait for `_ripe`
        # The cost up to which jobs may run inline. Fixed at load: a busy period must not change it.
        latency = batcher.latency
        self._quick_cost = QUICK_S / latency.full_s() if inline else 0.0
        self._direct = direct
        self._slow = False  # a job that costs more may be queued: the next batch may contain it
        self.down = self.stopping = False
        self._retired: Callable[[], RafagaError] | None = None

    @property
    def idle(self) -> bool:
        with self.lock:
            return self.batcher.idle

    def predicted_wait_s(self) -> float:
        """Predicted wait of a request of one row without a deadline that arrives now."""
        now = time.monotonic()
        probe = Job((np.zeros(1),), lambda *_: None, lambda _: None)
        probe.arrival = now
        with self.lock:
            return self.batcher.predicted_wait(probe, now)

    def capacity_rows_per_s(self) -> float:
        """Throughput in batches of the efficient size, of the engines that serve (or of one, while none does)."""
        with self.lock:
            latency = self.batcher.latency
            return self.batcher.engines * latency.efficient_rows / latency.full_s()

    def submit(self, job: Job, *, inline: bool = False) -> bool:
        """Queues `job`, or raises a Refused error and leaves its callbacks uncalled.

        `inline`: the caller can run or start a batch itself. True: no engine was woken, the caller must call
        `Worker.run_inline` soon.
        """
        with self.lock:
            if self._retired is not None:
                raise self._retired()
            if self.down and not self.stopping:
                raise ModelNotReady(DOWN)
            self.batcher.submit(job, time.monotonic())
            if self._looking_ahead and self.full():
                self._ripe.notify()
            self._slow = self._slow or job.cost > self._quick_cost
            if inline and (not self._slow or (self._direct and self.batcher.queued_rows == 1)):
                return True
            self._changed.notify()
            return False

    def cancel(self, job: Job) -> None:
        """The caller of `job` has cancelled: no callback is called any more, and no batch is formed with it."""
        with self.lock:
            if job.finished:
                return
            job.abandon()
            self.batcher.remove(job)
            if not job.taken:  # otherwise it is being computed: too late to save the work
                late = time.monotonic() >= job.deadline
                self._metrics.dropped("deadline" if late else "cancelled", 1)

    def take(self, after: Batch | None = None) -> Decision:
        """Lock held. The next batch for an engine; see Batcher.take. Other engines are woken for the rest."""
        decision = self.batcher.take(time.monotonic(), after)
        jobs = self.batcher.queued_jobs
        self._slow = self._slow and jobs > 0
        if decision.batch is not None and jobs and self.batcher.engines > 1:
            self._changed.notify()
            if self._looking_ahead and self.full():
                self._ripe.notify()
        return decision

    @property
    def quick(self) -> bool:
        """Lock held. Whether all queued jobs may run inline."""
        return not self._slow and self._quick_cost > 0

    def forbid_inline(self) -> None:
        """After an engine was lost: if the next one hangs too, it must not hang a transport's thread."""
        self._quick_cost, self._direct = 0.0, False

    def full(self, batches: int = 1) -> bool:
        """Lock held. Whether the queue fills so many batches of the efficient size."""
        return self.batcher.queued_rows >= batches * self.batcher.latency.efficient_rows

    def wait(self, timeout_s: float | None = None) -> None:
        """Lock held. Until a job arrives, or something else changed."""
        self._changed.wait(timeout_s)

    def wake_engine(self) -> None:
        """Lock held."""
        self._changed.notify()

    def wake_all(self) -> None:
        """Lock held."""
        self._changed.notify_all()
        self._ripe.notify_all()

    def wait_until_full(self, idle_engines: Callable[[], int], over: Callable[[], bool]) -> bool:
        """Lock held. Until the queue fills a batch beyond those that idle engines will take. False once `over`."""
        self._looking_ahead += 1
        try:
            while not over():
                if self.full(1 + idle_engines()) and not self.stopping:
                    return True
                self._ripe.wait()
            return False
        finally:
            self._looking_ahead -= 1

    def batch_completed(self, _: object) -> None:
        """Wakes engines that wait in `wait_until_full`."""
        with self.lock:
            self._ripe.notify_all()

    def yield_to_submitters(self) -> None:
        """Lets threads that hold requests queue them, before a batch is formed.

        They need the interpreter for a moment only, and the engine's thread often gets it first. As long as the queue
        grows by yielding, more threads have requests; a lone request costs one yield. Once a batch is full there is
        nothing to gain.
        """
        queued, before = self.batcher.queued_rows, 0
        while before < queued < self.batcher.latency.efficient_rows:
            before = queued
            os.sched_yield()
            queued = self.batcher.queued_rows

    def drain(self) -> None:
        """New jobs are refused; the queued ones run."""
        with self.lock:
            self.batcher.drain()
            self._changed.notify_all()

    def retire(self, error: Callable[[], RafagaError]) -> None:
        """New jobs are refused with `error`, and so are those that are left when the model closes."""
        with self.lock:
            self._retired = error
        self.drain()

    def stop(self) -> None:
        """New jobs are refused; engines stop after their current batch."""
        with self.lock:
            self.stopping = True
            self.batcher.drain()
            self._changed.notify_all()

    def refuse_all(self) -> None:
        """Fails every queued job: the model stops."""
        with self.lock:
            self.batcher.drain()
            left = self.batcher.remove_all()
        for job in left:
            stopped = Draining("the server stopped before the request ran")
            self.fail(job, self._retired() if self._retired else stopped)

    def drop(self, jobs: Sequence[Job]) -> None:
        """Fails jobs that would be late."""
        if jobs:
            self._metrics.dropped("deadline", len(jobs))
        for job in jobs:
            self.fail(job, DeadlineExceeded("the answer would have come after the deadline: nothing was computed"))

    def fail(self, job: Job, error: RafagaError) -> None:
        """Fails a job, with those of its rows that are still queued. An error in its callback is only logged."""
        with self.lock:
            self.batcher.remove(job)
        try:
            job.fail(error)
        except Exception:
            _LOG.exception("an error could not be delivered to its caller", extra={"model": self._name})
