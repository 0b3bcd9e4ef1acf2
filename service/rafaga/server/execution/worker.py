"""One engine and its thread: takes batches, runs them, and answers their jobs.

A run and the supervisor race for one test-and-set, so an engine that returns after it was given up answers no request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from rafaga.errors import EngineFailure, InternalError, NonFiniteOutput
from rafaga.server.engines.contract import Engine, PendingOutputs
from rafaga.server.engines.rejection import rejection
from rafaga.server.execution.queue import JobQueue
from rafaga.server.observability import families
from rafaga.server.observability.metrics import MAX_RECORDS, BatchRecord, ModelMetrics
from rafaga.server.scheduling.job import Arrays, Batch, Job, Part, padding_rows

_LOG = logging.getLogger(__name__)

# Rows with NaN or infinity that an error names.
_MOST_LISTED = 5


class GivenUp(Exception):
    """The engine was given up during this run: its thread must not answer any more."""


class EngineRun:
    """A run of an engine, and its time limit. The first to claim it, worker or supervisor, must give the answers.

    parts: (): the engine's own sample. bound_s: how long it may take. deadline: in the supervisor's seconds. on_hung:
    called when the run is given up.
    """

    __slots__ = ("_unclaimed", "bound_s", "deadline", "on_hung", "parts", "thread")

    def __init__(self, parts: Sequence[Part], bound_s: float, now: float, on_hung: Callable[[], None]) -> None:
        self.parts = parts
        self.bound_s = bound_s
        self.on_hung = on_hung
        self.thread = threading.current_thread()
        self.deadline = now + bound_s
        self._unclaimed = threading.Lock()

    def claim(self) -> bool:
        """True for the first caller."""
        return self._unclaimed.acquire(blocking=False)


class Overseer(Protocol):
    """The interface that a worker reports to: the Supervisor.

    A run may take `timeout_s`, or `slowness` times its prediction. One whose deadline is before `wake_at` must wake it.
    """

    clock: Callable[[], float]
    timeout_s: float
    slowness: float
    wake_at: float

    def wake(self) -> None: ...

    def lose(self, worker: Worker, why: str) -> None:
        """The worker cannot go on."""

    def idle_workers(self) -> int:
        """Lock held. Workers that serve and own no batch."""


class WorkerContext(NamedTuple):
    """What the workers of one model share. probe: the model's own sample, () if it has none. finite: the names of its
    outputs, () if they may be NaN or infinite."""

    name: str
    ragged: bool
    queue: JobQueue
    metrics: ModelMetrics
    probe: Sequence[Part]
    finite: tuple[str, ...] = ()


def _nothing() -> None:
    """No transport thread hangs with the run."""


class Worker:
    """Owns one engine until it is lost. `lost`, `owed` and `run` may be read by any thread with the queue's lock."""

    def __init__(self, engine: Engine, model: WorkerContext, overseer: Overseer) -> None:
        self.engine = engine
        self._model = model
        self._queue = model.queue
        self._overseer = overseer
        self.thread = threading.Thread(target=self._serve, name=f"engine-{model.name}", daemon=True)
        self._batch: Batch | None = None
        # A batch that was taken while another runs, or by the thread that brought it; its outputs once submitted.
        self._ahead: Batch | None = None
        self._ahead_outputs: PendingOutputs | None = None
        self._on_hung = _nothing
        self._sound = True  # the engine has run something since it last failed
        self.run: EngineRun | None = None
        self.lost = False

    @property
    def owed(self) -> tuple[Batch, ...]:
        """The batches that were taken and not answered."""
        # In this order: a batch that moves from ahead meanwhile is seen twice rather than not at all.
        return tuple(batch for batch in (self._ahead, self._batch) if batch is not None)

    def give_up(self) -> tuple[Batch, ...]:
        """Lock held. The worker takes no more batches; the caller must answer its batches."""
        self.lost = True
        return self.owed

    def run_inline(self, on_hung: Callable[[], None] = _nothing) -> bool:
        """Runs a batch in the caller's thread, if the engine is free. True: there is more to run, call again.

        An engine with a thread of its own is only started, and only for a lone row. `on_hung` is called, by any thread
        and perhaps twice, when the run is given up: the caller's thread may then never return. If it does, it must not
        touch anything that it shared.
        """
        try:
            if self.engine.depth > 1:
                self._start_lone_row()
                return False
            batch = self._claim(on_hung)
            if batch is None:
                return False
            if not self._complete(batch, None):
                on_hung()  # the supervisor may not have called it yet
                return False
        except Exception:
            # The thread is the transport's: it goes on, with a new engine.
            _LOG.critical("unhandled exception in the engine's run", exc_info=True, extra={"model": self._model.name})
            self._overseer.lose(self, "unhandled exception")
            return False
        with self._queue.lock:
            self._on_hung = _nothing
            if self._queue.stopping:
                self._queue.wake_all()
            return self._queue.batcher.queued_jobs > 0

    def _claim(self, on_hung: Callable[[], None]) -> Batch | None:
        """The next batch, unless the engine's own thread must take it: it has one, or the batch is not quick, or has to
        wait for more requests."""
        queue = self._queue
        with queue.lock:
            if self._batch is not None or self.lost or queue.stopping or not queue.quick:
                queue.wake_engine()
                return None
            decision = queue.take()
            self._batch = decision.batch
            if decision.batch is not None:
                self._on_hung = on_hung
            if decision.wake_at is not None:
                queue.wake_engine()
        if decision.dropped:
            queue.drop(decision.dropped)
        return decision.batch

    def _start_lone_row(self) -> None:
        """Hands a lone row to an idle engine. The worker's thread, which has to be woken for anything else, is woken
        meanwhile."""
        queue = self._queue
        dropped: Sequence[Job] = ()
        with queue.lock:
            if not (self.owed or self.lost or queue.stopping) and queue.batcher.queued_rows == 1:
                self._ahead, _, dropped = queue.take()
                if self._ahead is not None:
                    self._ahead_outputs = self.engine.submit(self._ahead.parts)
            queue.wake_engine()
        queue.drop(dropped)

    def _serve(self) -> None:
        about = {"model": self._model.name}
        try:
            while not self.lost:
                batch, outputs = self._next()
                if batch is None or not self._complete(batch, outputs):
                    break
        except BaseException:  # no caller handles it
            _LOG.critical("unhandled exception in the engine's thread", exc_info=True, extra=about)
        finally:
            if self._queue.stopping:
                self._queue.refuse_all()
            else:
                self._overseer.lose(self, "its thread ended")
            if not self.engine.close():
                _LOG.error("a run does not end: the memory of its engine stays taken", extra=about)

    def _next(self) -> tuple[Batch | None, PendingOutputs | None]:
        """Waits for a batch, and gives its outputs if it was submitted already. None when the model stops or the engine
        was lost."""
        queue = self._queue
        while True:
            if self._ahead is None:
                queue.yield_to_submitters()
            with queue.lock:
                if self._ahead is not None and not self.lost:
                    outputs, self._ahead_outputs = self._ahead_outputs, None
                    self._batch, self._ahead = self._ahead, None
                    return self._batch, outputs
                if self.lost or (queue.stopping and self._batch is None):
                    return None, None
                if self._batch is not None:  # it runs inline
                    queue.wait()
                    continue
                decision = queue.take()
                self._batch = decision.batch
                if decision.batch is None and not decision.dropped:
                    wake_at = decision.wake_at
                    queue.wait(None if wake_at is None else max(0.0, wake_at - time.monotonic()))
                    continue
            queue.drop(decision.dropped)
            if decision.batch is not None:
                return decision.batch, None

    def _complete(self, batch: Batch, outputs: PendingOutputs | None) -> bool:
        """Runs and answers the current batch. `outputs`: it was submitted already. False: the engine was given up."""
        try:
            self._run_batch(batch, outputs)
        except GivenUp:
            return False
        except Exception:
            _LOG.exception("unhandled exception: a batch was lost", extra={"model": self._model.name})
            for part in batch.parts:
                self._queue.fail(part.job, InternalError("the server failed on this batch; its log has the cause"))
        self._batch = None
        return True

    def _run_batch(self, batch: Batch, outputs: PendingOutputs | None) -> None:
        start = time.perf_counter()
        if batch.ahead:
            with self._queue.lock:
                self._queue.batcher.begun(batch, time.monotonic())
        predicted_s = batch.predicted_end - time.monotonic()
        bound_s = max(self._overseer.timeout_s, self._overseer.slowness * predicted_s)
        seconds: float | None = None
        try:
            error = self._answer(batch.parts, bound_s, outputs)
            if error is None:
                # Answering counts: it keeps the engine from the next batch too.
                seconds = time.perf_counter() - start
            else:
                self._sound = False
                failed = self._isolate(batch.parts, error, bound_s)
                if not failed:
                    about = {"model": self._model.name, "rows": batch.rows}
                    _LOG.error("a batch failed whose requests run apart", exc_info=error, extra=about)
                self._blame(failed, bound_s)
        finally:
            with self._queue.lock:
                if not self.lost:
                    self._queue.batcher.finished(batch, seconds)

    def _answer(self, parts: Sequence[Part], bound_s: float, outputs: PendingOutputs | None = None) -> Exception | None:
        """Runs and answers `parts`, or gives what the engine raised."""
        start = time.perf_counter()
        try:
            arrays = self._compute(parts, bound_s, outputs)
        except GivenUp:
            raise
        except Exception as error:
            return error
        _deliver(self._model, parts, arrays, time.perf_counter() - start)
        return None

    def _compute(self, parts: Sequence[Part], bound_s: float, outputs: PendingOutputs | None = None) -> Arrays:
        """One supervised run; without `parts` of the engine's own sample. Raises what the engine raises, or GivenUp."""
        overseer = self._overseer
        run = self.run = EngineRun(parts, bound_s, overseer.clock(), self._on_hung)
        if run.deadline < overseer.wake_at:
            overseer.wake()
        try:
            if outputs is None:
                outputs = self.engine.submit(parts or self._model.probe)
            if self.engine.depth > 1 and parts:
                self._look_ahead(outputs)
            arrays = outputs.result()
            self._sound = True
        finally:
            if not run.claim():
                raise GivenUp
            self.run = None
        return arrays

    def _look_ahead(self, running: PendingOutputs) -> None:
        """While a batch runs: takes the next as soon as it is full, and submits it. A smaller one is left to grow until
        the running one is done."""
        queue, current = self._queue, self._batch
        if self._ahead is not None or current is None:
            return
        running.add_done_callback(queue.batch_completed)
        with queue.lock:
            if not queue.wait_until_full(self._overseer.idle_workers, lambda: running.done() or self.lost):
                return
            decision = queue.take(after=current)
            self._ahead = batch = decision.batch
        queue.drop(decision.dropped)
        if batch is not None:
            self._ahead_outputs = self.engine.submit(batch.parts)

    def _isolate(self, parts: Sequence[Part], error: Exception, bound_s: float) -> list[tuple[Job, Exception]]:
        """Parts made the engine fail together, with `error`. Runs them by halves: answers those that run, and gives the
        jobs that fail alone, each with the error of that run."""
        if len(parts) == 1:
            return [(parts[0].job, error)]
        middle = len(parts) // 2
        failed: list[tuple[Job, Exception]] = []
        for half in (parts[:middle], parts[middle:]):
            wanted = [part for part in half if not part.job.finished]  # the other callers have cancelled
            if wanted and (of_half := self._answer(wanted, bound_s)) is not None:
                failed += self._isolate(wanted, of_half, bound_s)
        return failed

    def _blame(self, failed: Sequence[tuple[Job, Exception]], bound_s: float) -> None:
        """Fails jobs that the engine failed on. If it fails on its own sample too, the engine is the cause; otherwise
        the input is, unless the device or the server failed."""
        if self._model.probe and not self._sound:
            try:
                self._compute((), bound_s)
            except GivenUp:
                raise
            except Exception:
                _LOG.exception("the engine fails on its own sample", extra={"model": self._model.name})
                self._overseer.lose(self, "it fails on its own sample")
                return
        _fail(self._model, failed)


def _fail(model: WorkerContext, failed: Sequence[tuple[Job, Exception]]) -> None:
    about = {"model": model.name}
    for job, cause in failed:
        if job.finished:
            continue
        rejected = rejection(cause)
        if rejected is None:
            _LOG.error("the engine failed on a request", exc_info=cause, extra=about)
            model.metrics.job_failed(families.FAILURES)
        else:
            _LOG.info("a request was rejected: %s", rejected.message, extra=about)
            model.metrics.job_failed(families.REJECTED_INPUTS)
        model.queue.fail(job, rejected or EngineFailure("the engine failed on this input; see the server's log"))


def _finite(outputs: Arrays) -> bool:
    """Integers always are."""
    return all(o.dtype.kind != "f" or bool(np.isfinite(o).all()) for o in outputs)


def _refuse_non_finite(model: WorkerContext, parts: Sequence[Part], outputs: Arrays) -> None:
    """Fails the jobs whose outputs hold NaN or infinity; the others of the batch are answered."""
    at = 0
    for job, start, stop in parts:
        end = at + stop - start
        wrong = next((i for i, o in enumerate(outputs) if not _finite((o[at:end],))), None)
        if wrong is not None and not job.finished:
            numbers = np.arange(job.rows)[job.numbers(start, stop)]
            bad = np.sort(numbers[~np.isfinite(outputs[wrong][at:end]).reshape(end - at, -1).all(axis=1)])
            rows = ", ".join(map(str, bad[:_MOST_LISTED].tolist())) + (", …" if len(bad) > _MOST_LISTED else "")
            error = NonFiniteOutput(
                f"the model's output {model.finite[wrong]} is NaN or infinite for row {rows} of this input: the model "
                "does not support it (often an input of equal values)"
            )
            _LOG.info("a request was rejected: %s", error.message, extra={"model": model.name})
            model.metrics.job_failed(families.NON_FINITE_OUTPUTS)
            model.queue.fail(job, error)
        at = end


def _deliver(model: WorkerContext, parts: Sequence[Part], outputs: Arrays, seconds: float) -> None:
    rows = sum(stop - start for _, start, stop in parts)
    if model.finite and not _finite(outputs):
        _refuse_non_finite(model, parts, outputs)  # their jobs are finished then
    # Counted first: a caller that has its answer finds it in the statistics.
    done = [p.job for p in parts if p.stop == p.job.rows and not p.job.finished]
    queue_s, earlier_s = [j.queue_s for j in done], sum(j.inference_s for j in done)
    model.metrics.batches.append(BatchRecord(rows, seconds, queue_s, earlier_s, time.time()))
    if len(model.metrics.batches) >= MAX_RECORDS:
        model.metrics.fold()
    padding = model.queue.batcher.latency.rows_run(rows) - rows
    if padding or model.ragged:
        model.metrics.padded(padding + padding_rows(parts))
    at = 0
    for job, start, stop in parts:
        end = at + stop - start
        try:
            job.answer(start, tuple(o[at:end] for o in outputs), seconds, rows)
        except Exception:
            # A failure to build one reply must not take the other answers with it.
            _LOG.exception("an answer could not be delivered", extra={"model": model.name})
            model.queue.fail(job, InternalError("the answer could not be built"))
        at = end
