"""The engine of every device: one session of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnxruntime as ort

from rafaga import int8
from rafaga.bundle import Bundle
from rafaga.plain_model import PlainModel
from rafaga.server.engines.batched import BatchedEngine
from rafaga.server.scheduling.job import Arrays

Session = Any
"""onnxruntime.InferenceSession, which has no type hints; tests bring their own."""


NO_FILES = "/proc/self/fdinfo"
"""A folder where no file can be created."""


def session_options(threads: int, spinning: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # it plans memory per batch size, and sizes vary
    # Bytes may be a file of two formats at once: what was checked is the one of ONNX.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # Models with tensors in other files are refused before. If the check misses one, ONNX Runtime must not find its
    # file in the working directory.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", NO_FILES)
    # Spinning threads take cores from the transport and the decoders.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    int8.configure(options)
    options.log_severity_level = 3
    return options


def create_session(model: bytes, threads: int, spinning: bool = False) -> ort.InferenceSession:
    """A CPU session. The model comes as bytes, so that exactly the hashed bytes run."""
    return ort.InferenceSession(model, session_options(threads, spinning), providers=["CPUExecutionProvider"])


class SessionEngine(BatchedEngine):
    """buckets, pipelined: see BatchedEngine."""

    def __init__(
        self, model: Bundle | PlainModel, session: Session, buckets: Sequence[int] = (), pipelined: bool = False
    ) -> None:
        super().__init__(model, buckets, pipelined)
        self._input_names = tuple(i.name for i in model.inputs)
        self._output_names = tuple(o.name for o in model.outputs)
        self._session = session
        # One for all runs: an engine that was terminated never runs again.
        self._options = ort.RunOptions()

    def _compute(self, inputs: Arrays) -> Arrays:
        if (session := self._session) is None:
            raise RuntimeError("the engine is closed")
        feed = dict(zip(self._input_names, inputs, strict=True))
        return tuple(session.run(self._output_names, feed, self._options))

    def terminate(self) -> None:
        """ONNX Runtime checks between two nodes of the graph: a node that never returns cannot be ended."""
        self._options.terminate = True

    def _release(self) -> None:
        self._session = None
