"""A served model: a bundle, its engine, its queue, and the thread that feeds one from the other."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence

import numpy as np

from rafaga.bundle import Bundle, Variant
from rafaga.errors import DeadlineExceeded, Draining, EngineFailure, InternalError, RafagaError
from rafaga.server.batcher import Arrays, Batch, Batcher, BatchPolicy, Job, Part
from rafaga.server.engine import Engine, Samples, assemble
from rafaga.server.latency import LatencyTable
from rafaga.server.metrics import ModelMetrics
from rafaga.server.plain import PlainModel

_LOG = logging.getLogger(__name__)


class ServedModel:
    """`submit` from any thread; the engine's thread calls the jobs' callbacks. `variant` None: a PlainModel has none.

    Whoever is queued or running when the model closes gets an answer or an error: the engine's thread owes it.
    """

    def __init__(
        self,
        bundle: Bundle | PlainModel,
        variant: Variant | None,
        engine: Engine,
        latency: LatencyTable,
        policy: BatchPolicy,
        metrics: ModelMetrics,
        samples: Samples,
    ) -> None:
        self.bundle = bundle
        self.variant = variant
        self.batched = bundle.max_batch_size > 0
        self.max_batch_size = latency.buckets[-1] if self.batched else 0
        self.metrics = metrics
        # What the latency table was measured on; costs of other sizes are relative to it.
        self.reference_size = max(1, samples.inputs[0][0].size)
        self._engine = engine
        self._batcher = Batcher(policy, latency)
        self._changed = threading.Condition(threading.Lock())
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name=f"engine-{bundle.name}", daemon=True)

    def start(self) -> None:
        self.metrics.watch_queue(lambda: self._batcher.queued_rows, lambda: self._batcher.queued_jobs)
        self.metrics.watch_load(self.predicted_wait_s, self.capacity_rows_per_s)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queues `job`, or raises a Refused error and leaves its callbacks uncalled."""
        with self._changed:
            self._batcher.submit(job, time.monotonic())
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """The caller of `job` went away: it leaves the queue, and no batch is formed with it any more."""
        with self._changed:
            if not job.finished:
                job.abandon()
                self._batcher.remove(job)
                if not job.taken:  # otherwise it is being computed: too late to save the work
                    late = time.monotonic() >= job.deadline
                    self.metrics.dropped("deadline" if late else "cancelled", 1)

    def drain(self) -> None:
        """New jobs are refused; the queued ones run."""
        with self._changed:
            self._batcher.drain()
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        with self._changed:
            return self._batcher.idle

    def predicted_wait_s(self) -> float:
        """How long a request of one row and no deadline would wait that came now."""
        now = time.monotonic()
        visitor = Job((np.zeros(1),), lambda *_: None, lambda _: None)
        visitor.arrival = now
        with self._changed:
            return self._batcher.predicted_wait(visitor, now)

    def capacity_rows_per_s(self) -> float:
        """What the engine would get through in batches of the efficient size."""
        with self._changed:
            latency = self._batcher.latency
            return latency.efficient_rows / latency.predict(latency.efficient_rows)

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops after the running batch; what is still queued is refused."""
        with self._changed:
            self._stopping = True
            self._batcher.drain()
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        self._refuse_queued()  # behind an engine that hangs, nobody else would
        self.metrics.watch_no_more()

    def _serve(self) -> None:
        try:
            while (batch := self._next()) is not None:
                try:
                    self._run(batch)
                except Exception:
                    _LOG.exception("a batch was lost to a defect", extra={"model": self.bundle.name})
                    for part in batch.parts:
                        self._fail(part.job, InternalError("the server failed on this batch; its log has the cause"))
        except Exception:
            _LOG.critical("the engine's thread ended on a defect", exc_info=True, extra={"model": self.bundle.name})
        finally:
            self._refuse_queued()

    def _refuse_queued(self) -> None:
        with self._changed:
            self._batcher.drain()
            left = self._batcher.remove_all()
        for job in left:
            self._fail(job, Draining("the model stopped before the request ran: send it again"))

    def _next(self) -> Batch | None:
        """Waits for a batch; None when the model is closing."""
        while True:
            self._let_in()
            with self._changed:
                if self._stopping:
                    return None
                decision = self._batcher.take(time.monotonic())
                if decision.batch is None and not decision.dropped:
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
        with self._changed:
            self._batcher.remove(job)
        try:
            job.fail(error)
        except Exception:
            _LOG.exception("a failure could not be delivered", extra={"model": self.bundle.name})

    def _run(self, batch: Batch) -> None:
        start = time.perf_counter()
        seconds: float | None = None
        try:
            error = self._answer(batch.parts)
            if error is None:
                # With the answering, because that too keeps the engine from the next batch.
                seconds = time.perf_counter() - start
            else:
                # The text of the cause may hold other callers' data, so only the log gets it.
                about = {"model": self.bundle.name, "rows": batch.rows}
                _LOG.error("a batch failed", exc_info=error, extra=about)
                self._isolate(batch.parts)
        finally:
            with self._changed:
                self._batcher.finished(batch, seconds)

    def _answer(self, parts: Sequence[Part]) -> Exception | None:
        """Runs and answers `parts`, or gives what the engine raised."""
        start = time.perf_counter()
        try:
            outputs = self._engine.run(assemble(parts))
        except Exception as error:
            return error
        self._deliver(parts, outputs, time.perf_counter() - start)
        return None

    def _isolate(self, parts: Sequence[Part]) -> None:
        """Of parts that made the engine fail together, answers by halves all but those that make it fail alone."""
        if len(parts) == 1:
            job = parts[0].job
            if not job.finished:
                self.metrics.engine_failed()
            self._fail(job, EngineFailure("the model failed on this input; other requests are not affected"))
            return
        middle = len(parts) // 2
        for half in (parts[:middle], parts[middle:]):
            wanted = [part for part in half if not part.job.finished]  # the others' callers went away meanwhile
            if wanted and self._answer(wanted) is not None:
                self._isolate(wanted)

    def _deliver(self, parts: Sequence[Part], outputs: Arrays, seconds: float) -> None:
        rows = sum(part.stop - part.start for part in parts)
        # Booked first: whoever has an answer finds it in the statistics.
        done = [p.job for p in parts if p.stop == p.job.rows and not p.job.finished]
        self.metrics.batch_done(rows, seconds, [j.queue_s for j in done], sum(j.inference_s for j in done))
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
