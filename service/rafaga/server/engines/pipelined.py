"""The engine for GPUs, and for large models on the CPU: buffers that exist once, and two batches in flight.

Two slots hold buffers for a batch of the largest size each. While the batch in one runs, the next is assembled in the
other. On a device, rows are padded to a bucket, so that it sees few different shapes. The outputs' shapes must be known
except for the rows; other models are run by `SessionEngine`.
"""

from __future__ import annotations

import math
import traceback
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from rafaga.bundle import TensorSpec
from rafaga.server.engines.contract import ModelSpec, PendingOutputs, failed
from rafaga.server.engines.device_memory import HostDeviceBuffer, HostMemory
from rafaga.server.engines.onnxruntime import Session
from rafaga.server.engines.rows import Array, Shape, blocks_of, joined_shape, write
from rafaga.server.engines.serial_executor import SerialExecutor
from rafaga.server.scheduling.job import Arrays, Part

DEPTH = 2


class _Slot(NamedTuple):
    """Buffers for one batch. outputs: [] where nothing is copied: there every batch gets arrays of its own."""

    inputs: list[HostDeviceBuffer]
    outputs: list[HostDeviceBuffer]


def has_known_outputs(model: ModelSpec) -> bool:
    """Whether `PipelinedEngine` can run a model: it takes batches, and its outputs' shapes are known."""
    known = all(size is not None for spec in model.outputs for size in spec.shape[1:])
    return model.max_batch_size > 0 and known and not any(s.dtype == "object" for s in (*model.inputs, *model.outputs))


class PipelinedEngine:
    """Implements `Engine`, for `has_known_outputs` models. buckets: the batch sizes that a device runs, the largest
    last; on the CPU any size up to it runs without padding."""

    depth = DEPTH

    def __init__(self, model: ModelSpec, session: Session, memory: HostMemory, buckets: Sequence[int]) -> None:
        """Raises DeviceError when there is no memory for the buffers."""
        self._inputs, self._outputs = model.inputs, model.outputs
        self._session = session
        self._memory = memory
        # ONNX Runtime would copy an input that a CPU kernel reads to the host when it is bound: before its upload.
        self._on_host = frozenset[str]() if memory.unified else _on_host(session)
        self._buckets = tuple(buckets)
        self._options = ort.RunOptions()
        if not memory.unified:
            # One wait, for the run and the download together.
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._free = deque(self._slot() for _ in range(DEPTH))
        self._executor = SerialExecutor(f"device-{model.name}")

    def submit(self, rows: Sequence[Part]) -> PendingOutputs:
        slot = self._free.popleft()
        count = sum(part.stop - part.start for part in rows)
        try:
            bucket = count if self._memory.unified else self._buckets[bisect_left(self._buckets, count)]
            batches = [self._fill(slot, index, rows, bucket) for index in range(len(self._inputs))]
            # Here and not in the executor, which waits for the batch before.
            for spec, buffer, batch in zip(self._inputs, slot.inputs, batches, strict=True):
                if spec.name not in self._on_host:
                    self._memory.upload(buffer, batch.nbytes)
        except Exception as error:
            self._free.append(slot)
            return failed(error)
        outputs: Future[Arrays] = Future()
        self._executor.post(partial(self._complete, slot, [batch.shape for batch in batches], count, outputs))
        return outputs

    def terminate(self) -> None:
        """As `SessionEngine.terminate`."""
        self._options.terminate = True

    def close(self, timeout_s: float = 10.0) -> bool:
        if not self._executor.close(timeout_s):
            return False
        # In this order: a session must not outlive the stream it runs on.
        self._session = None
        self._memory.close()
        return True

    def _slot(self) -> _Slot:
        most, memory = self._buckets[-1], self._memory
        inputs = [memory.buffer(_size(spec, most)) for spec in self._inputs]
        return _Slot(inputs, [] if memory.unified else [memory.buffer(_size(spec, most)) for spec in self._outputs])

    def _fill(self, slot: _Slot, index: int, rows: Sequence[Part], bucket: int) -> Array:
        """Writes one input's rows into the slot; gives the batch there."""
        blocks = blocks_of(rows, index)
        shape, dtype = joined_shape(blocks, bucket), np.dtype(self._inputs[index].dtype)
        size = dtype.itemsize * math.prod(shape)
        if size > len(slot.inputs[index].host):  # free dimensions have grown
            larger = self._memory.buffer(2 * size)
            self._memory.release(slot.inputs[index])
            slot.inputs[index] = larger
        batch = slot.inputs[index].view(shape, dtype)
        write(blocks, batch)
        return batch

    def _complete(self, slot: _Slot, shapes: Sequence[Shape], rows: int, future: Future[Arrays]) -> None:
        """In the executor: runs a batch and brings its outputs."""
        try:
            outputs = self._run(slot, shapes, rows)
        except BaseException as error:
            # The frames of the failed calls hold the session, which must not outlive its stream.
            traceback.clear_frames(error.__traceback__)
            self._free.append(slot)
            future.set_exception(error)
            del future  # the error's traceback holds this frame: a reference cycle
        else:
            self._free.append(slot)
            future.set_result(outputs)

    def _run(self, slot: _Slot, shapes: Sequence[Shape], rows: int) -> Arrays:
        session, memory = self._session, self._memory
        if session is None:
            raise RuntimeError("the engine is closed")
        binding = session.io_binding()
        for spec, shape, buffer in zip(self._inputs, shapes, slot.inputs, strict=True):
            binding.bind_input(*self._bound(spec, shape, buffer))
        output_shapes = [(shapes[0][0], *(size or 0 for size in spec.shape[1:])) for spec in self._outputs]
        if memory.unified:
            outputs = tuple(
                np.empty(shape, spec.dtype) for spec, shape in zip(self._outputs, output_shapes, strict=True)
            )
            for spec, output in zip(self._outputs, outputs, strict=True):
                binding.bind_output(spec.name, "cpu", 0, output.dtype.type, output.shape, output.ctypes.data)
            session.run_with_iobinding(binding, self._options)
            return tuple(output[:rows] for output in outputs)
        for spec, shape, buffer in zip(self._outputs, output_shapes, slot.outputs, strict=True):
            binding.bind_output(*self._bound(spec, shape, buffer))
        session.run_with_iobinding(binding, self._options)
        views = []
        for spec, shape, buffer in zip(self._outputs, output_shapes, slot.outputs, strict=True):
            views.append(buffer.view(shape, np.dtype(spec.dtype)))
            if spec.name not in self._on_host:
                memory.download(buffer, views[-1].nbytes)
        memory.finish()
        return tuple(view[:rows].copy() for view in views)

    def _bound(self, spec: TensorSpec, shape: Shape, buffer: HostDeviceBuffer) -> tuple[str, str, int, Any, Shape, int]:
        """The arguments of ONNX Runtime's bind_input and bind_output."""
        dtype = np.dtype(spec.dtype).type
        if spec.name in self._on_host:
            return spec.name, "cpu", 0, dtype, shape, buffer.host.ctypes.data
        return spec.name, self._memory.device, self._memory.index, dtype, shape, buffer.address


def _on_host(session: Session) -> frozenset[str]:
    """The inputs and outputs that kernels of the CPU read and write."""
    inputs = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    outputs = zip(session.get_outputs(), session.get_output_memory_infos(), strict=True)
    return frozenset(tensor.name for tensor, memory in (*inputs, *outputs) if memory.name != "Cuda")


def _size(spec: TensorSpec, rows: int) -> int:
    """Bytes of `rows` rows, free dimensions counted as one: buffers grow when they have to."""
    return rows * np.dtype(spec.dtype).itemsize * math.prod(size or 1 for size in spec.shape[1:])
