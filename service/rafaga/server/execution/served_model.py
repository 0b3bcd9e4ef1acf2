"""A served model: a bundle, its engine, its queue, and the thread that feeds one from the other.

An engine that is lost (its run does not end, it fails on inputs that it must run, its thread dies) takes with it what
it owes and nothing else: its requests fail, new ones are refused, and a new engine is brought up. See `watch`.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np

from rafaga.bundle import Bundle, Variant
from rafaga.errors import (
    BundleError,
    DeadlineExceeded,
    DeviceError,
    Draining,
    EngineFailure,
    InternalError,
    ModelNotFound,
    ModelNotReady,
    RafagaError,
)
from rafaga.plain_model import PlainModel
from rafaga.server.engines.onnxruntime import Engine, Samples, assemble, padding_rows
from rafaga.server.engines.pipelined import BoundEngine, Flight
from rafaga.server.execution.supervisor import Watch, WatchPolicy
from rafaga.server.execution.worker import Relieved, Run, Shift
from rafaga.server.observability.metrics import ModelMetrics
from rafaga.server.scheduling.batcher import Batch, Batcher, BatchPolicy
from rafaga.server.scheduling.job import Arrays, Job, Part
from rafaga.server.scheduling.latency import LatencyTable

_LOG = logging.getLogger(__name__)

QUICK_S = 3e-3
"""Batches that run no longer may be run by the thread that brings the requests: waking another one takes long too."""

_DOWN = "the model's engine was lost and is being restarted: ask another replica, or later"


class ServedModel:
    """`submit` from any thread; the engine's thread calls the jobs' callbacks. `variant` None: a PlainModel has none.

    Whoever is queued or running when the model closes gets an answer or an error: the engine's thread owes it.
    Several engines, one for each device, take from one queue.
    """

    def __init__(
        self,
        bundle: Bundle | PlainModel,
        variant: Variant | None,
        engines: Sequence[Engine],
        latency: LatencyTable,
        policy: BatchPolicy,
        metrics: ModelMetrics,
        samples: Samples,
        renew: Callable[[int], Engine],
        watch: WatchPolicy | None = None,
    ) -> None:
        """`renew` gives an engine as good as that of `engines` whose number it is told: right, and warm."""
        self.bundle = bundle
        self.variant = variant
        self.batched = bundle.max_batch_size > 0
        self.max_batch_size = latency.buckets[-1] if self.batched else 0
        self.metrics = metrics
        self._ragged = any(None in spec.shape[1:] for spec in bundle.inputs)
        # By which input the cost of a row is told, the largest of those that come in any size; and how large it was
        # when the latency table was measured.
        free = [i for i, spec in enumerate(bundle.inputs) if None in spec.shape[1 if self.batched else 0 :]]
        self.sized_by = max(free or [0], key=lambda i: int(samples.inputs[i][0].size))
        self.reference_size = max(1, samples.inputs[self.sized_by][0].size)
        self._batcher = Batcher(policy, latency, len(engines))
        self._lock = threading.Lock()  # taken as itself, because entering a Condition is two calls in Python
        self._changed = threading.Condition(self._lock)
        # A full batch waits, or one has landed: for engines that could send another while one runs.
        self._ripe = threading.Condition(self._lock)
        self._looking_ahead = 0  # engines that wait for it
        # The cost up to which jobs may be run from outside. Measured at warm-up, because a busy spell is no reason to
        # change to the slower way. What overlaps its batches or has others beside it is not run from outside.
        alone = len(engines) == 1 and not isinstance(engines[0], BoundEngine)
        self._quick_cost = QUICK_S / latency.predict(latency.efficient_rows) if alone else 0.0
        self._slow = False  # a job that costs more may be queued: the next batch may be its own
        self._stopping = False
        self._retired: Callable[[], RafagaError] | None = None
        self._down = False
        self._tell: Callable[[], None] = lambda: None
        self._probe = samples.tiled(1)
        self._shifts = [Shift(engine, self._serve, bundle.name) for engine in engines]
        self._stuck: list[threading.Thread] = []
        # By engine: how many new ones its device refused since the last that it took, and who is not hoped for.
        self._failures = [0] * len(engines)
        self._hopeless: set[int] = set()
        self._renew = renew
        self._watch_policy = watch or WatchPolicy()
        self._watch = Watch(self, self._watch_policy, bundle.name)

    def start(self, tell: Callable[[], None] = lambda: None) -> None:
        """`tell` is called whenever `down` has changed."""
        self._tell = tell
        self.metrics.watch_queue(lambda: self._batcher.queued_rows, lambda: self._batcher.queued_jobs)
        self.metrics.watch_load(self.predicted_wait_s, self.capacity_rows_per_s)
        for shift in self._shifts:
            shift.thread.start()
        self._watch.start()

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Those that serve now."""
        return tuple(shift.engine for shift in self._shifts)

    @property
    def down(self) -> bool:
        """All its engines were lost, and there is no new one yet."""
        return self._down

    @property
    def hopeless(self) -> bool:
        """All its engines were lost, and only a new process helps."""
        return len(self._hopeless) == len(self._shifts)

    def submit(self, job: Job, *, may_run: bool = False) -> bool:
        """Queues `job`, or raises a Refused error and leaves its callbacks uncalled.

        `may_run`: the caller could run a quick batch itself. True when it is to: by `step`, nobody else was woken.
        """
        with self._lock:
            if self._retired is not None:
                raise self._retired()
            if self._down and not self._stopping:
                raise ModelNotReady(_DOWN)
            self._batcher.submit(job, time.monotonic())
            if self._looking_ahead and self._full():
                self._ripe.notify()
            self._slow = self._slow or job.cost > self._quick_cost
            if may_run and not self._slow:
                return True
            self._changed.notify()
            return False

    def run_inline(self, on_hung: Callable[[], None] = lambda: None) -> bool:
        """Runs a batch in the caller's thread, if the engine is free. True when there is more to run: call again.

        `on_hung` is called, by any thread and perhaps twice, when the run is given up: the caller's thread may never
        come back. If it does, it has to call nothing again.
        """
        shift = self._shifts[0]
        try:
            batch = self._claim(shift, on_hung)
            if batch is None:
                return False
            if not self._run_guarded(shift, batch):
                on_hung()  # whoever gave the run up may not have come to it yet
                return False
        except Exception:
            # The thread is the transport's: it goes on, with a new engine.
            _LOG.critical("the engine was lost to a defect", exc_info=True, extra={"model": self.bundle.name})
            self._lose(shift, "a defect")
            return False
        with self._lock:
            shift.on_hung = None
            if self._stopping:
                self._changed.notify_all()
            return self._batcher.queued_jobs > 0

    def _claim(self, shift: Shift, on_hung: Callable[[], None]) -> Batch | None:
        """The next batch, unless the engine's thread has one, or what is queued is not quick, or there is something to
        wait for: that thread then goes on."""
        with self._lock:
            if shift.batch is not None or shift.relieved or self._stopping or self._slow or not self._quick_cost:
                self._changed.notify()
                return None
            decision = self._batcher.take(time.monotonic())
            shift.batch = decision.batch
            shift.on_hung = None if decision.batch is None else on_hung
            if decision.wake_at is not None:
                self._changed.notify()
        if decision.dropped:
            self._drop(decision.dropped)
        return decision.batch

    def cancel(self, job: Job) -> None:
        """The caller of `job` went away: it leaves the queue, and no batch is formed with it any more."""
        with self._lock:
            if not job.finished:
                job.abandon()
                self._batcher.remove(job)
                if not job.taken:  # otherwise it is being computed: too late to save the work
                    late = time.monotonic() >= job.deadline
                    self.metrics.dropped("deadline" if late else "cancelled", 1)

    def drain(self) -> None:
        """New jobs are refused; the queued ones run."""
        with self._lock:
            self._batcher.drain()
            self._changed.notify_all()

    def retire(self, *, replaced: bool) -> None:
        """`drain`, while the server goes on: who found the model before is told that it went. `replaced`: by another
        version, which the request finds when it is sent again."""
        about = f"model {self.bundle.name!r} version {self.bundle.version}"
        with self._lock:
            if replaced:
                self._retired = lambda: ModelNotReady(f"{about} was just replaced: send the request again")
            else:
                self._retired = lambda: ModelNotFound(f"{about} was just unloaded")
        self.drain()

    @property
    def idle(self) -> bool:
        with self._lock:
            return self._batcher.idle

    def predicted_wait_s(self) -> float:
        """How long a request of one row and no deadline would wait that came now."""
        now = time.monotonic()
        visitor = Job((np.zeros(1),), lambda *_: None, lambda _: None)
        visitor.arrival = now
        with self._lock:
            return self._batcher.predicted_wait(visitor, now)

    def capacity_rows_per_s(self) -> float:
        """What the engines that serve (or one, while none does) would get through in batches of the efficient size."""
        with self._lock:
            latency = self._batcher.latency
            return self._batcher.engines * latency.efficient_rows / latency.predict(latency.efficient_rows)

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops after the running batches; what is still queued is refused. Engines that stand still let go of what
        they hold of their devices; one that hangs keeps it until its run ends."""
        with self._lock:
            self._stopping = True
            self._batcher.drain()
            self._changed.notify_all()
            shifts = list(self._shifts)
        self._watch.close()
        end = time.monotonic() + timeout_s
        for shift in shifts:
            if shift.thread.ident is None:
                shift.engine.close()
                continue
            shift.thread.join(max(0.0, end - time.monotonic()))
            self._refuse_queued()  # behind an engine that hangs, nobody else would
            run = shift.run
            if shift.thread.is_alive() and run is not None and run.claim():
                self._lose(shift, "its run did not end when the model closed", run)
        self._refuse_queued()
        self.metrics.watch_no_more()

    # What its watch asks.

    @property
    def lacking(self) -> list[int]:
        return [number for number, shift in enumerate(self._shifts) if shift.relieved]

    @property
    def give_up_at(self) -> float:
        return min((run.give_up_at for _, run in self._runs()), default=math.inf)

    def be_patient(self) -> None:
        for _, run in self._runs():
            run.give_up_at = time.monotonic() + run.bound_s

    def give_up(self) -> None:
        for shift, run in self._runs():
            if run.give_up_at <= time.monotonic() and run.claim():
                self._lose(shift, "its run passed its bound", run)

    def _runs(self) -> list[tuple[Shift, Run]]:
        """What engines that were not given up compute now."""
        runs = ((shift, shift.run) for shift in self._shifts if not shift.relieved)
        return [(shift, run) for shift, run in runs if run is not None]

    def renew(self, number: int) -> bool:
        about = {"model": self.bundle.name, "engine": number}
        with self._lock:
            self._stuck = [thread for thread in self._stuck if thread.is_alive()]
            piled_up = len(self._stuck) >= self._watch_policy.max_stuck
        if piled_up:
            self._give_up_hope(number, "lost ones still hang")
            return False
        engine: Engine | None = None
        try:
            engine = self._renew(number)
            shift = Shift(engine, self._serve, self.bundle.name)
            with self._lock:
                stopping = self._stopping
                if not stopping:
                    shift.thread.start()
                    self._shifts[number] = shift
                    self._failures[number] = 0
                    self._hopeless.discard(number)
                    self._count_engines()
        except Exception as error:  # onnxruntime raises bare exceptions of many kinds
            _LOG.exception("no new engine yet", extra=about)
            if engine is not None:  # the system gave it no thread
                engine.close()
            # What is wrong with the bundle would be wrong in a new process too.
            self._failures[number] += not isinstance(error, BundleError) or isinstance(error, DeviceError)
            if self._failures[number] >= self._watch_policy.max_failures:
                self._give_up_hope(number, f"the device refused {self._failures[number]} in a row")
            return False
        if stopping:
            shift.engine.close()
            return True
        self.metrics.engine_restarted()
        _LOG.warning("a new engine serves", extra=about)
        self._tell()
        return True

    def _count_engines(self) -> None:
        """Under the lock, after one was lost or made."""
        serving = sum(not shift.relieved for shift in self._shifts)
        self._down = not serving
        self._batcher.engines = max(1, serving)

    def _give_up_hope(self, number: int, why: str) -> None:
        about = {"model": self.bundle.name, "engine": number}
        _LOG.critical("no new engine: %s, only a new process helps", why, extra=about)
        if number not in self._hopeless:
            self._hopeless.add(number)
            self._tell()

    def _lose(self, shift: Shift, why: str, run: Run | None = None) -> None:
        """Ends an engine and fails exactly what it owes. `run`: what it computes, claimed from it.

        That run's jobs are not to be sent again, since one of them may be what engines hang on. All others may be.
        Whoever waits goes on to wait while another engine serves.
        """
        self._quick_cost = 0.0  # what was lost once is not run by a transport's thread again
        with self._lock:
            if shift.relieved:
                return
            shift.relieved = True
            self._count_engines()
            waiting = self._batcher.remove_all() if self._down else []
            owed = shift.owed
            for batch in owed:
                self._batcher.finished(batch, None)
            if run is not None:
                self._stuck.append(run.thread)
            self._changed.notify_all()
            self._ripe.notify_all()
        shift.engine.terminate()
        if run is not None and shift.on_hung is not None:
            shift.on_hung()
        _LOG.critical("engine lost: %s", why, extra={"model": self.bundle.name})
        self._tell()
        self._fail_owed(run.parts if run is not None else (), [p for b in owed for p in b.parts], waiting)
        self._watch.wake()

    def _fail_owed(self, running: Sequence[Part], batch: Sequence[Part], waiting: Sequence[Job]) -> None:
        for job, _, _ in running:
            if not job.finished:
                self.metrics.engine_failed()
            self._fail(job, EngineFailure("the model's engine was lost while it ran this input; it is being restarted"))
        for job in (*(part.job for part in batch), *waiting):
            self._fail(job, ModelNotReady(_DOWN))

    def _serve(self, shift: Shift) -> None:
        try:
            while not shift.relieved:
                batch, flight = shift.catch_up() or (self._next(shift), None)
                if batch is None or not self._run_guarded(shift, batch, flight):
                    break
        except BaseException:  # whatever it is, it has nowhere to go from here
            _LOG.critical("the engine's thread ended on a defect", exc_info=True, extra={"model": self.bundle.name})
        finally:
            if self._stopping:
                self._refuse_queued()
            else:
                self._lose(shift, "its thread ended")
            if not shift.engine.close():
                _LOG.error("a run does not end: its memory stays taken", extra={"model": self.bundle.name})

    def _run_guarded(self, shift: Shift, batch: Batch, flight: Flight | Exception | None = None) -> bool:
        """Runs and answers the shift's batch. False when its engine was given up meanwhile."""
        try:
            self._run(shift, batch, flight)
        except Relieved:
            return False
        except Exception:
            _LOG.exception("a batch was lost to a defect", extra={"model": self.bundle.name})
            for part in batch.parts:
                self._fail(part.job, InternalError("the server failed on this batch; its log has the cause"))
        shift.batch = None
        return True

    def _refuse_queued(self) -> None:
        with self._lock:
            self._batcher.drain()
            left = self._batcher.remove_all()
        for job in left:
            error = self._retired() if self._retired else Draining("the server stopped before the request ran")
            self._fail(job, error)

    def _next(self, shift: Shift) -> Batch | None:
        """Waits for a batch; None when the model is closing, or the engine was lost."""
        while True:
            self._let_in()
            with self._lock:
                if shift.relieved or (self._stopping and shift.batch is None):
                    return None
                if shift.batch is not None:  # a thread that brought requests runs it
                    self._changed.wait()
                    continue
                decision = self._batcher.take(time.monotonic())
                shift.batch = decision.batch
                self._slow = self._slow and self._batcher.queued_jobs > 0
                if decision.batch is not None:
                    self._pass_on()
                elif not decision.dropped:
                    timeout = None if decision.wake_at is None else max(0.0, decision.wake_at - time.monotonic())
                    self._changed.wait(timeout)
                    continue
            if decision.dropped:
                self._drop(decision.dropped)
            if decision.batch is not None:
                return decision.batch

    def _let_in(self) -> None:
        """Lets the threads that already hold requests queue them, before a batch is formed.

        They only want the interpreter for a moment, and the engine's thread often gets it first. While giving way
        makes the queue grow, more had arrived than was queued; a lone request finds nobody to give way to. Once a batch
        is full there is nothing to gain, and under overload the queue would grow and grow.
        """
        queued, before = self._batcher.queued_rows, 0
        while before < queued < self._batcher.latency.efficient_rows:
            before = queued
            os.sched_yield()
            queued = self._batcher.queued_rows

    def _drop(self, jobs: Sequence[Job]) -> None:
        self.metrics.dropped("deadline", len(jobs))
        for job in jobs:
            self._fail(job, DeadlineExceeded("the answer would have come after the deadline: nothing was computed"))

    def _fail(self, job: Job, error: RafagaError) -> None:
        """Fails a job, with the rows of it that still wait. Its callback cannot end the engine's thread."""
        with self._lock:
            self._batcher.remove(job)
        try:
            job.fail(error)
        except Exception:
            _LOG.exception("a failure could not be delivered", extra={"model": self.bundle.name})

    def _full(self, batches: int = 1) -> bool:
        return self._batcher.queued_rows >= batches * self._batcher.latency.efficient_rows

    def _pass_on(self) -> None:
        """Under the lock, after taking a batch: another engine that waits gets what is left."""
        if len(self._shifts) > 1 and self._batcher.queued_jobs:
            self._changed.notify()
            if self._looking_ahead and self._full():
                self._ripe.notify()

    def _full_one(self, shift: Shift, running: Batch, landed: Future[Arrays]) -> Batch | None:
        """A full batch, as soon as there is one, for an engine that is `running` another; the shift owes it. None once
        that has `landed`, for a smaller one is better left to grow until then, or the engine was lost."""
        landed.add_done_callback(self._has_landed)
        with self._lock:
            self._looking_ahead += 1
            try:
                while not (over := landed.done() or shift.relieved):
                    idle = sum(not (other.owed or other.relieved) for other in self._shifts)  # they come first
                    if self._full(1 + idle) and not self._stopping:
                        break
                    self._ripe.wait()
                if over:
                    return None
                decision = self._batcher.take(time.monotonic(), after=running)
                shift.ahead = decision.batch
                self._pass_on()
            finally:
                self._looking_ahead -= 1
        if decision.dropped:
            self._drop(decision.dropped)
        return decision.batch

    def _has_landed(self, _: Future[Arrays]) -> None:
        with self._lock:
            self._ripe.notify_all()

    def _run(self, shift: Shift, batch: Batch, flight: Flight | Exception | None = None) -> None:
        """`flight`: the batch is already under way."""
        start = time.perf_counter()
        if batch.ahead:
            with self._lock:
                self._batcher.begun(batch, time.monotonic())
        bound_s = self._watch_policy.bound_s(batch.predicted_end - time.monotonic())
        seconds: float | None = None
        try:
            error = self._answer(shift, batch.parts, bound_s, flight)
            if error is None:
                # With the answering, because that too keeps the engine from the next batch.
                seconds = time.perf_counter() - start
            else:
                # The text of the cause may hold other callers' data, so only the log gets it.
                about = {"model": self.bundle.name, "rows": batch.rows}
                _LOG.error("a batch failed", exc_info=error, extra=about)
                shift.sound = False
                self._blame(shift, self._isolate(shift, batch.parts, bound_s), bound_s)
        finally:
            if not shift.relieved:
                with self._lock:
                    self._batcher.finished(batch, seconds)

    def _answer(
        self, shift: Shift, parts: Sequence[Part], bound_s: float, flight: Flight | Exception | None = None
    ) -> Exception | None:
        """Runs and answers `parts`, or gives what the engine raised."""
        start = time.perf_counter()
        try:
            if isinstance(flight, Exception):
                raise flight
            if isinstance(shift.engine, BoundEngine):
                landing = partial(self._land, shift, shift.engine, flight or shift.engine.begin(parts))
                outputs = shift.compute(Run(parts, bound_s), landing, self._watch.expect)
            else:
                outputs = shift.compute(
                    Run(parts, bound_s), partial(shift.engine.run, assemble(parts)), self._watch.expect
                )
        except Relieved:
            raise
        except Exception as error:
            return error
        self._deliver(parts, outputs, time.perf_counter() - start)
        return None

    def _land(self, shift: Shift, engine: BoundEngine, flight: Flight) -> Arrays:
        """Waits for a batch, and sends the next meanwhile, if there is a full one."""
        if shift.ahead is None and shift.batch is not None:
            batch = self._full_one(shift, shift.batch, flight.landed)
            if batch is not None:
                try:
                    shift.flight = engine.begin(batch.parts)
                except Exception as error:  # it is that batch's, when its turn comes
                    shift.flight = error
        return engine.finish(flight)

    def _isolate(self, shift: Shift, parts: Sequence[Part], bound_s: float) -> list[Job]:
        """Of parts that made the engine fail together, answers by halves all but those that make it fail alone, which
        it gives."""
        if len(parts) == 1:
            return [parts[0].job]
        middle = len(parts) // 2
        blamed: list[Job] = []
        for half in (parts[:middle], parts[middle:]):
            wanted = [part for part in half if not part.job.finished]  # the others' callers went away meanwhile
            if wanted and self._answer(shift, wanted, bound_s) is not None:
                blamed += self._isolate(shift, wanted, bound_s)
        return blamed

    def _blame(self, shift: Shift, jobs: Sequence[Job], bound_s: float) -> None:
        """Fails jobs that the engine failed on, unless it fails on what it ran before too: then it is the engine."""
        if not shift.sound:
            try:
                shift.compute(Run((), bound_s), partial(shift.engine.run, self._probe), self._watch.expect)
            except Relieved:
                raise
            except Exception:
                _LOG.exception("the engine fails on its own sample", extra={"model": self.bundle.name})
                self._lose(shift, "it fails on its own sample")
                return
        for job in jobs:
            if not job.finished:
                self.metrics.engine_failed()
            self._fail(job, EngineFailure("the model failed on this input; other requests are not affected"))

    def _deliver(self, parts: Sequence[Part], outputs: Arrays, seconds: float) -> None:
        rows = sum(part.stop - part.start for part in parts)
        # Booked first: whoever has an answer finds it in the statistics.
        done = [p.job for p in parts if p.stop == p.job.rows and not p.job.finished]
        self.metrics.batch_done(rows, seconds, [j.queue_s for j in done], sum(j.inference_s for j in done))
        filling = self._batcher.latency.rows_run(rows) - rows
        if filling or self._ragged:
            self.metrics.padded(filling + padding_rows(parts))
        at = 0
        for job, start, stop in parts:
            end = at + stop - start
            try:
                job.answer(start, tuple(o[at:end] for o in outputs), seconds, rows)
            except Exception:
                # A defect in building one reply must not take the others' answers with it.
                _LOG.exception("an answer could not be delivered", extra={"model": self.bundle.name})
                self._fail(job, InternalError("the answer could not be built"))
            at = end
