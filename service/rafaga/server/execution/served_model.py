"""A served model: a bundle, its engines, and the queue they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rafaga.bundle import Bundle
from rafaga.errors import ModelNotFound, ModelNotReady
from rafaga.plain_model import PlainModel
from rafaga.server.engines.contract import Engine, whole
from rafaga.server.engines.loading import Samples
from rafaga.server.engines.runtimes import Runtime
from rafaga.server.execution.queue import JobQueue
from rafaga.server.execution.supervisor import Supervisor, SupervisorPolicy
from rafaga.server.execution.worker import WorkerContext
from rafaga.server.observability.metrics import ModelMetrics
from rafaga.server.scheduling.batcher import Batcher, BatchPolicy
from rafaga.server.scheduling.latency import LatencyTable


class ServedModel:
    """Call its methods from any thread. Every job that was accepted gets exactly one answer or error, which an engine's
    thread delivers. Several engines take batches from one queue.

    submit, cancel, drain: see JobQueue. run_inline: see Worker. sized_by: the input whose size decides the cost of a
    row: of those with free dimensions, the largest; None: every row costs the same, or nothing is known.
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
        self.instances = len(engines)
        self.batched = bundle.max_batch_size > 0
        self.ragged = bundle.ragged
        self.max_batch_size = latency.buckets[-1] if self.batched else 0
        self.metrics = metrics
        free = [i for i, spec in enumerate(bundle.inputs) if None in spec.shape[1 if self.batched else 0 :]]
        sizes = [int(array[0].size) for array in samples.inputs]
        self.sized_by = max(free, key=lambda i: sizes[i]) if free and samples.valid else None
        self.reference_size = max(1, sizes[self.sized_by or 0])
        self.timed = tuple(i for i, spec in enumerate(bundle.inputs) if self.ragged and spec.shape[1:2] == (None,))
        # Batches of an engine with a thread of its own, or of one among several, never run inline.
        single, direct = len(engines) == 1, engines[0].depth > 1
        batcher = Batcher(policy, latency, len(engines))
        self.queue = JobQueue(batcher, metrics, bundle.name, inline=single and not direct, direct=single and direct)
        probe = (whole(samples.tiled(1)),) if samples.valid else ()
        checked = () if bundle.allow_non_finite else tuple(spec.name for spec in bundle.outputs)
        context = WorkerContext(bundle.name, bundle.ragged, self.queue, metrics, probe, checked)
        self._supervisor = Supervisor(context, engines, load_engine, supervision or SupervisorPolicy(), clock)
        # Bound once: requests pass through the queue and its worker, and not through the facade.
        self.submit, self.cancel, self.drain = self.queue.submit, self.queue.cancel, self.queue.drain
        self.run_inline = self._supervisor.workers[0].run_inline  # only models with one engine run inline

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
        return self.queue.down

    @property
    def unrecoverable(self) -> bool:
        """All its engines were lost, and a restart of the process is required."""
        return self._supervisor.unrecoverable

    @property
    def idle(self) -> bool:
        return self.queue.idle

    def retire(self, *, replaced: bool) -> None:
        """Drains while the server goes on: later requests that found this model get an error that says what happened.
        `replaced`: another version serves, so the client may send the request again."""
        about = f"model {self.bundle.name!r} version {self.bundle.version}"
        if replaced:
            self.queue.retire(lambda: ModelNotReady(f"{about} was just replaced: send the request again"))
        else:
            self.queue.retire(lambda: ModelNotFound(f"{about} was just unloaded"))

    def close(self, timeout_s: float = 10.0) -> None:
        """Stops after the current batches and refuses the jobs that are still queued. Engines release their device
        memory; one that hangs keeps it until its run ends."""
        self.queue.stop()
        self._supervisor.close(timeout_s)
        self.queue.refuse_all()
        self.metrics.watch_no_more()
