"""The engine that computes in the caller's thread: one ONNX Runtime session and no buffers of its own."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from rafaga import int8
from rafaga.server.engines.contract import Completed, ModelSpec, PendingOutputs, failed
from rafaga.server.engines.device_memory import HostMemory
from rafaga.server.engines.rows import assemble
from rafaga.server.scheduling.job import Arrays, Part

Session = Any
"""onnxruntime.InferenceSession, which has no type hints; tests bring their own."""


def session_options(threads: int, spinning: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it plans memory per batch size, and sizes vary
    # Spinning threads take cores from the transport and the decoders.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    int8.configure(options)
    options.log_severity_level = 3
    return options


def create_session(model: bytes, threads: int, spinning: bool = False) -> ort.InferenceSession:
    """A CPU session. The model comes as bytes, so that what was hashed is what runs."""
    return ort.InferenceSession(model, session_options(threads, spinning), providers=["CPUExecutionProvider"])


class SessionEngine:
    """Implements `Engine`. A model that takes no batches gets batches of one row, which is its whole input.

    buckets: the batch sizes that run; others are padded to the next one. (): any size. memory: closed with the engine.
    """

    depth = 1

    def __init__(
        self, model: ModelSpec, session: Session, buckets: Sequence[int] = (), memory: HostMemory | None = None
    ) -> None:
        self._batched = model.max_batch_size > 0
        self._input_names = tuple(i.name for i in model.inputs)
        self._output_names = tuple(o.name for o in model.outputs)
        self._session = session
        self._buckets = tuple(buckets)
        self._memory = memory or HostMemory()
        # One for all runs: an engine that was terminated never runs again.
        self._options = ort.RunOptions()

    def submit(self, rows: Sequence[Part]) -> PendingOutputs:
        try:
            return Completed(self._run(rows))
        except Exception as error:  # onnxruntime raises bare exceptions of many kinds
            return failed(error)

    def _run(self, parts: Sequence[Part]) -> Arrays:
        session = self._session
        if session is None:
            raise RuntimeError("the engine is closed")
        rows = sum(stop - start for _, start, stop in parts)
        batch = self._buckets[bisect_left(self._buckets, rows)] if self._buckets else rows
        inputs = assemble(parts, batch)
        if not self._batched:
            inputs = tuple(a[0, ...] for a in inputs)  # an array even without dimensions
        outputs = session.run(self._output_names, dict(zip(self._input_names, inputs, strict=True)), self._options)
        if not self._batched:
            return tuple(np.asarray(o)[np.newaxis] for o in outputs)
        if any(len(output) != batch for output in outputs):  # callers would wait for the missing rows forever
            raise ValueError(f"expected {batch} rows in every output, got {[len(o) for o in outputs]}")
        return tuple(o[:rows] for o in outputs)

    def terminate(self) -> None:
        """ONNX Runtime checks between two nodes of the graph: a node that never returns cannot be ended."""
        self._options.terminate = True

    def close(self, timeout_s: float = 10.0) -> bool:
        self._session = None
        self._memory.close()
        return True
