"""A served model: a bundle, its engines, and the queue they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rafaga.bundle import Bundle
from rafaga.errors import Draining, ModelNotFound, ModelNotReady, RafagaError
from rafaga.plain_model import PlainModel
from rafaga.server.engines.contract import Engine, whole
from rafaga.server.engines.loading import Samples
from rafaga.server.engines.runtimes import Runtime
from rafaga.server.execution.queue import JobQueue
from rafaga.server.execution.supervisor import DOWN, Supervisor, SupervisorPolicy
from rafaga.server.execution.worker import WorkerContext
from rafaga.server.observability.metrics import ModelMetrics
from rafaga.server.scheduling.batcher import Batcher, BatchPolicy
from rafaga.server.scheduling.job import Arrays, Job
from rafaga.server.scheduling.latency import LatencyTable


class ServedModel:
    """Call its methods from any thread. Every job that was accepted gets exactly one answer or error, which an engine's
    thread delivers. Several engines take batches from one queue.

    sized_by: the input whose size decides the cost of a row: of those with free dimensions, the largest.
    reference_size: elements of a row of that input when the latency table was measured. timed: the inputs whose second
    axis is the length of a ragged row.
    """

    def __init__(
        self,
        bundle: Bundle | PlainModel,
        runtime: Runtime,
        engines: Sequence[Engine],
        latency: LatencyTable,
        policy: BatchPolicy,
        metrics: ModelMetrics,
        samples: Samples,
        load_engine: Callable[[int], Engine],
        supervision: SupervisorPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`load_engine` returns a verified and warm engine to replace the one of
        `engines` with that number."""
        self.bundle = bundle
        self.runtime = runtime
        self.batched = bundle.max_batch_size > 0
        self.ragged = bundle.ragged
        self.max_batch_size = latency.buckets[-1] if self.batched else 0
        self.metrics = metrics
        free = [i for i, spec in enumerate(bundle.inputs) if None in spec.shape[1 if self.batched else 0 :]]
        self.sized_by = max(free or [0], key=lambda i: int(samples.inputs[i][0].size))
        self.timed = tuple(i for i, spec in enumerate(bundle.inputs) if self.ragged and spec.shape[1:2] == (None,))
        self.reference_size = max(1, int(samples.inputs[self.sized_by][0].size))
        # Batches of an engine that takes the next one while it runs, or of one among several, never run inline.
        inline = len(engines) == 1 and engines[0].depth == 1
        self.queue = JobQueue(Batcher(policy, latency, len(engines)), metrics, bundle.name, inline=inline)
        self._retired: Callable[[], RafagaError] | None = None
        self._valid_samples = samples.valid
        probe = (whole(samples.tiled(1)),) if samples.valid else ()
        checked = () if bundle.allow_non_finite else tuple(spec.name for spec in bundle.outputs)
        context = WorkerContext(bundle.name, bundle.ragged, self.queue, metrics, probe, self._refusal, checked)
        self._supervisor = Supervisor(context, engines, load_engine, supervision or SupervisorPolicy(), clock)

    def start(self, on_change: Callable[[], None] = lambda: None) -> None:
        """`on_change` is called whenever `down` or `unrecoverable` has changed."""
        queue = self.queue
        self.metrics.watch_queue(
            lambda: queue.batcher.queued_rows,
            lambda: queue.batcher.queued_jobs,
            queue.predicted_wait_s,
            queue.capacity_rows_per_s,
        )
        self._supervisor.start(on_change)

    @property
    def down(self) -> bool:
        """All its engines were lost, and none is restarted yet."""
        return self._supervisor.down

    @property
    def unrecoverable(self) -> bool:
        """All its engines were lost, and a restart of the process is required."""
        return self._supervisor.unrecoverable

    @property
    def idle(self) -> bool:
        return self.queue.idle

    def submit(self, job: Job, *, inline: bool = False) -> bool:
        """Queues `job`, or raises a Refused error and leaves its callbacks uncalled.

        `inline`: the caller can run a quick batch itself. True: no other thread was woken, the caller must call
        `run_inline` soon.
        """
        with self.queue.lock:
            if self._retired is not None:
                raise self._retired()
            if self._supervisor.down and not self.queue.stopping:
                raise ModelNotReady(DOWN)
            return self.queue.submit(job, inline)

    def run_inline(self, on_hung: Callable[[], None] = lambda: None) -> bool:
        """Runs one batch in the caller's thread, if the model is quick and its engine free. True: there is more to run,
        call again.

        `on_hung` is called, by any thread and perhaps twice, when the run is given up: the caller's thread may then
        never return. If it does, it must not touch anything that it shared.
        """
        return self._supervisor.workers[0].run_inline(on_hung)  # only models with one engine run inline

    def cost(self, inputs: Arrays) -> float:
        """The work per row, relative to the samples; 1 where those say nothing."""
        if not self._valid_samples:
            return 1.0
        # An input may be empty.
        return max(1, int(inputs[self.sized_by].size)) / len(inputs[0]) / self.reference_size

    def cancel(self, job: Job) -> None:
        """The caller of `job` has cancelled: no callback is called any more, and no batch is formed with it."""
        with self.queue.lock:
            if job.finished:
                return
            job.abandon()
            self.queue.batcher.remove(job)
            if not job.taken:  # otherwise it is being computed: too late to save the work
                late = time.monotonic() >= job.deadline
                self.metrics.dropped("deadline" if late else "cancelled", 1)

    def drain(self) -> None:
        """New jobs are refused; the queued ones run."""
        self.queue.drain()

    def retire(self, *, replaced: bool) -> None:
        """Drains while the server goes on: later requests that found this model get an error that says what happened.
        `replaced`: another version serves, so the client may send the request again."""
        about = f"model {self.bundle.name!r} version {self.bundle.version}"
        with self.queue.lock:
            if replaced:
                self._retired = lambda: ModelNotReady(f"{about} was just replaced: send the request again")
            else:
                self._retired = lambda: ModelNotFound(f"{about} was just unloaded")
        self.drain()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops after the current batches and refuses the jobs that are still queued. Engines release their device
        memory; one that hangs keeps it until its run ends."""
        self.queue.stop()
        self._supervisor.close(timeout_s)
        self.queue.refuse_all(self._refusal)
        self.metrics.watch_no_more()

    def _refusal(self) -> RafagaError:
        return self._retired() if self._retired else Draining("the server stopped before the request ran")
