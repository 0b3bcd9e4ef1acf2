"""Supervises the engines of one model: finds runs that do not end, and restarts engines that were lost.

    a run passes its deadline, or the engine is lost  →  its requests fail, health changes  →  wait  →  new engine

An engine that restarts, which may take minutes or never end, has a thread of its own, so the others stay supervised.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rafaga.errors import BundleError, DeviceError, EngineFailure, ModelNotReady
from rafaga.server.engines.contract import Engine
from rafaga.server.execution.queue import DOWN
from rafaga.server.execution.worker import EngineRun, Worker, WorkerContext
from rafaga.server.observability.families import FAILURES
from rafaga.server.scheduling.job import Job, Part

_LOG = logging.getLogger(__name__)

# A supervisor that wakes this late was stopped with the whole process: the engine is not the cause.
_OVERSLEPT_S = 1.0


@dataclass(frozen=True)
class SupervisorPolicy:
    """When a run is given up, and how often a lost engine is restarted.

    timeout_s: shortest bound of a run; the bound is `slowness` times the prediction where that is longer.
    first_delay_s to max_delay_s: the wait before a restart, doubled each time, and reset once an engine has lasted for
    stable_s. max_stuck: threads of lost engines that may hang at a time; with more, no engine is restarted.
    max_failures: restarts that may fail in a row before the engine is reported unrecoverable: some errors of CUDA stay
    until the process ends. Restarts continue nevertheless.
    """

    timeout_s: float = 10.0
    slowness: float = 20.0
    first_delay_s: float = 0.5
    max_delay_s: float = 60.0
    stable_s: float = 300.0
    max_stuck: int = 2
    max_failures: int = 8


class Backoff:
    """How long to wait before the next restart. An engine that is lost soon after its start does not reset it."""

    def __init__(self, policy: SupervisorPolicy) -> None:
        self._policy = policy
        self._delay_s = policy.first_delay_s
        self._last = -math.inf

    def next(self, now: float) -> float:
        """Seconds to wait from `now` on."""
        if now - self._last > self._policy.stable_s:
            self._delay_s = self._policy.first_delay_s
        delay_s = self._delay_s
        self._delay_s = min(2 * delay_s, self._policy.max_delay_s)
        self._last = now + delay_s
        return delay_s


class Supervisor:
    """`load` returns a verified and warm engine to replace the one with that number. Its thread sleeps until a run
    passes its deadline; a run that ends before costs a comparison."""

    def __init__(
        self,
        context: WorkerContext,
        engines: Sequence[Engine],
        load: Callable[[int], Engine],
        policy: SupervisorPolicy,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.timeout_s, self.slowness = policy.timeout_s, policy.slowness
        self.wake_at = math.inf  # when the thread looks at the runs again
        self._context = context
        self._queue = context.queue
        self._load = load
        self._policy = policy
        self._on_change: Callable[[], None] = lambda: None
        self.workers = [Worker(engine, context, self) for engine in engines]
        self._stuck: list[threading.Thread] = []  # of lost engines
        # By the number of the engine.
        self._failures = [0] * len(engines)  # restarts that failed in a row
        self._backoffs = [Backoff(policy) for _ in engines]
        self._unrecoverable: set[int] = set()
        self._restarting: set[int] = set()
        self._changed = threading.Condition(threading.Lock())
        self._closed = False
        self._thread = threading.Thread(target=self._supervise, name=f"supervisor-{context.name}", daemon=True)

    def start(self, on_change: Callable[[], None]) -> None:
        """`on_change` is called whenever the queue's `down` or `unrecoverable` has changed."""
        self._on_change = on_change
        for worker in self.workers:
            worker.thread.start()
        self._thread.start()

    @property
    def unrecoverable(self) -> bool:
        """All engines were lost, and a restart of the process is required."""
        return len(self._unrecoverable) == len(self.workers)

    def idle_workers(self) -> int:
        """Queue's lock held. Workers that serve and own no batch."""
        return sum(not (worker.owed or worker.lost) for worker in self.workers)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def lose(self, worker: Worker, why: str, run: EngineRun | None = None) -> None:
        """Ends an engine and fails exactly the jobs that it has taken. `run`: what it computes, claimed from it.

        Clients must not retry that run's jobs, since one of them may be why the engine hangs. They may retry all
        others. Queued jobs go on waiting while another engine serves.
        """
        self._queue.forbid_inline()
        with self._queue.lock:
            if worker.lost:
                return
            owed = worker.give_up()
            self._count_engines()
            waiting = self._queue.batcher.remove_all() if self._queue.down else []
            for batch in owed:
                self._queue.batcher.finished(batch, None)
            if run is not None:
                self._stuck.append(run.thread)
            self._queue.wake_all()
        worker.engine.terminate()
        if run is not None:
            run.on_hung()
        _LOG.critical("engine lost: %s", why, extra={"model": self._context.name})
        self._on_change()
        self._fail(run.parts if run is not None else (), [p.job for b in owed for p in b.parts] + waiting)
        self.wake()

    def close(self, timeout_s: float) -> None:
        """After the queue was stopped. Does not wait for an engine that restarts."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with self._queue.lock:
            workers = list(self.workers)
        end = time.monotonic() + timeout_s
        for worker in workers:
            if worker.thread.ident is None:  # it was never started
                worker.engine.close()
                continue
            if worker.lost:
                continue  # its thread closes the engine, should it return
            worker.thread.join(max(0.0, end - time.monotonic()))
            self._queue.refuse_all()
            run = worker.run
            if worker.thread.is_alive() and run is not None and run.claim():
                self.lose(worker, "its run did not end when the model closed", run)

    def _fail(self, running: Sequence[Part], others: Sequence[Job]) -> None:
        for job, _, _ in running:
            if not job.finished:
                self._context.metrics.job_failed(FAILURES)
            error = EngineFailure("the model's engine was lost while it ran this input; it is being restarted")
            self._queue.fail(job, error)
        for job in others:
            self._queue.fail(job, ModelNotReady(DOWN))

    def _count_engines(self) -> None:
        """Queue's lock held."""
        serving = sum(not worker.lost for worker in self.workers)
        self._queue.down = not serving
        self._queue.batcher.engines = max(1, serving)

    def _supervise(self) -> None:
        while not self._closed:
            for number in self._to_restart():
                self._start_restarting(number)
            late_s = self._sleep()
            if late_s is None:
                continue
            if late_s > _OVERSLEPT_S:
                self._extend_deadlines()
            else:
                self._give_up()

    def _sleep(self) -> float | None:
        """Waits until a run has passed its deadline, and returns for how long; None when something else changed."""
        with self._changed:
            # In this order: a run that begins now either wakes this thread, or is found below.
            self.wake_at = math.inf
            at = self.wake_at = self._first_deadline()
            if self._closed or self._to_restart():
                return None
            now = self.clock()
            if now < at:
                self._changed.wait(None if at == math.inf else at - now)
            now = self.clock()
            return now - at if self._first_deadline() == at <= now else None

    def _first_deadline(self) -> float:
        return min((run.deadline for _, run in self._runs()), default=math.inf)

    def _extend_deadlines(self) -> None:
        for _, run in self._runs():
            run.deadline = self.clock() + run.bound_s

    def _give_up(self) -> None:
        for worker, run in self._runs():
            if run.deadline <= self.clock() and run.claim():
                self.lose(worker, "its run passed its deadline", run)

    def _runs(self) -> list[tuple[Worker, EngineRun]]:
        """The current runs of the engines that were not lost."""
        runs = ((worker, worker.run) for worker in self.workers if not worker.lost)
        return [(worker, run) for worker, run in runs if run is not None]

    def _to_restart(self) -> set[int]:
        return {number for number, worker in enumerate(self.workers) if worker.lost} - self._restarting

    def _start_restarting(self, number: int) -> None:
        with self._changed:
            self._restarting.add(number)
        name = f"restart-{self._context.name}"
        try:
            threading.Thread(target=self._restart_until_done, args=(number,), name=name, daemon=True).start()
        except RuntimeError:
            _LOG.exception("no thread to restart an engine: the supervisor does it, and finds no hung run meanwhile")
            self._restart_until_done(number)

    def _restart_until_done(self, number: int) -> None:
        try:
            while self._pause(self._backoffs[number].next(time.monotonic())):
                if self._restart(number):
                    break
        finally:
            with self._changed:
                self._restarting.discard(number)
                self._changed.notify_all()

    def _pause(self, seconds: float) -> bool:
        """False when the model closes meanwhile."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._closed, seconds)

    def _restart(self, number: int) -> bool:
        """One attempt to replace a lost engine."""
        about = {"model": self._context.name, "engine": number}
        with self._queue.lock:
            self._stuck = [thread for thread in self._stuck if thread.is_alive()]
            too_many = len(self._stuck) >= self._policy.max_stuck
        if too_many:
            self._report_unrecoverable(number, f"{len(self._stuck)} lost engines still hang")
            return False
        engine: Engine | None = None
        try:
            engine = self._load(number)
            worker = Worker(engine, self._context, self)
            with self._queue.lock:
                stopping = self._queue.stopping
                if not stopping:
                    worker.thread.start()
                    self.workers[number] = worker
                    self._failures[number] = 0
                    self._unrecoverable.discard(number)
                    self._count_engines()
        except Exception as error:  # onnxruntime raises bare exceptions of many kinds
            _LOG.exception("an engine could not be restarted", extra=about)
            if engine is not None:  # the system gave it no thread
                engine.close()
            # A broken bundle would be broken in a new process too.
            self._failures[number] += not isinstance(error, BundleError) or isinstance(error, DeviceError)
            if self._failures[number] >= self._policy.max_failures:
                self._report_unrecoverable(number, f"{self._failures[number]} restarts failed in a row")
            return False
        if stopping:
            engine.close()
            return True
        self._context.metrics.engine_restarted()
        _LOG.warning("engine restarted", extra=about)
        self._on_change()
        return True

    def _report_unrecoverable(self, number: int, why: str) -> None:
        about = {"model": self._context.name, "engine": number}
        _LOG.critical("engine unrecoverable: %s, restart of the process required", why, extra=about)
        if number not in self._unrecoverable:
            self._unrecoverable.add(number)
            self._on_change()
