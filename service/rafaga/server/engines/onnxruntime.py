"""The engine of the CPU, and of models on a GPU whose outputs have no known size: one session of ONNX Runtime."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort

from rafaga import int8
from rafaga.server.engines.contract import DEPTH, Completed, ModelSpec, PendingOutputs, failed
from rafaga.server.engines.device_memory import CudaMemory
from rafaga.server.engines.rows import assemble
from rafaga.server.engines.serial_executor import SerialExecutor
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
    pipelined: with a thread of its own, so that the next batch is assembled while one runs.
    """

    def __init__(
        self,
        model: ModelSpec,
        session: Session,
        buckets: Sequence[int] = (),
        memory: CudaMemory | None = None,
        pipelined: bool = False,
    ) -> None:
        self.depth = DEPTH if pipelined else 1
        self._executor = SerialExecutor(f"session-{model.name}") if pipelined else None
        self._batched = model.max_batch_size > 0
        self._input_names = tuple(i.name for i in model.inputs)
        self._output_names = tuple(o.name for o in model.outputs)
        self._session = session
        self._buckets = tuple(buckets)
        self._memory = memory
        # One for all runs: an engine that was terminated never runs again.
        self._options = ort.RunOptions()

    def submit(self, rows: Sequence[Part]) -> PendingOutputs:
        try:
            count = sum(stop - start for _, start, stop in rows)
            batch = self._buckets[bisect_left(self._buckets, count)] if self._buckets else count
            inputs = assemble(rows, batch)
            if self._executor is not None:
                return self._executor.submit(partial(self._run, inputs, count))
            return Completed(self._run(inputs, count))
        except Exception as error:  # onnxruntime raises bare exceptions of many kinds
            return failed(error)

    def _run(self, inputs: Arrays, rows: int) -> Arrays:
        session, batch = self._session, len(inputs[0])
        if session is None:
            raise RuntimeError("the engine is closed")
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
        if self._executor is not None and not self._executor.close(timeout_s):
            return False
        self._session = None
        if self._memory is not None:
            self._memory.close()
        return True
