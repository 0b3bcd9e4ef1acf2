"""The engine of GPUs: buffers that exist once, and two batches in flight.

Two slots hold buffers for a batch of the largest size each. While the batch in one runs, the next is assembled in the
other. Rows are padded to a bucket, so that the device sees few different shapes. The outputs' shapes must be known
except for the rows; other models are run by `SessionEngine`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from rafaga.bundle import TensorSpec
from rafaga.server.engines.contract import DEPTH, ModelSpec, PendingOutputs, failed
from rafaga.server.engines.device_memory import CudaMemory, HostDeviceBuffer
from rafaga.server.engines.onnxruntime import Session
from rafaga.server.engines.rows import Array, Shape, blocks_of, joined_shape, write
from rafaga.server.engines.serial_executor import SerialExecutor
from rafaga.server.scheduling.job import Arrays, Part


class _Slot(NamedTuple):
    """Buffers for one batch."""

    inputs: list[HostDeviceBuffer]
    outputs: list[HostDeviceBuffer]


def has_known_outputs(model: ModelSpec) -> bool:
    """Whether `CudaEngine` can run a model: it takes batches, and its outputs' shapes are known."""
    known = all(size is not None for spec in model.outputs for size in spec.shape[1:])
    return model.max_batch_size > 0 and known and not any(s.dtype == "object" for s in (*model.inputs, *model.outputs))


class CudaEngine:
    """Implements `Engine`, for `has_known_outputs` models. buckets: the batch sizes that run, the largest last."""

    depth = DEPTH

    def __init__(self, model: ModelSpec, session: Session, memory: CudaMemory, buckets: Sequence[int]) -> None:
        """Raises DeviceError when there is no memory for the buffers."""
        self._inputs, self._outputs = model.inputs, model.outputs
        self._session = session
        self._memory = memory
        # ONNX Runtime would copy an input that a CPU kernel reads to the host when it is bound: before its upload.
        self._on_host = _on_host(session)
        self._buckets = tuple(buckets)
        self._options = ort.RunOptions()
        # One wait, for the run and the download together.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._free = deque(self._slot() for _ in range(DEPTH))
        self._executor = SerialExecutor(f"device-{model.name}")

    def submit(self, rows: Sequence[Part]) -> PendingOutputs:
        slot = self._free.popleft()
        count = sum(part.stop - part.start for part in rows)
        try:
            bucket = self._buckets[bisect_left(self._buckets, count)]
            batches = [self._fill(slot, index, rows, bucket) for index in range(len(self._inputs))]
            # Here and not in the executor, which waits for the batch before.
            for spec, buffer, batch in zip(self._inputs, slot.inputs, batches, strict=True):
                if spec.name not in self._on_host:
                    self._memory.upload(buffer, batch.nbytes)
        except Exception as error:
            self._free.append(slot)
            return failed(error)
        return self._executor.submit(partial(self._run, slot, [batch.shape for batch in batches], count))

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
        inputs, outputs = (
            [self._memory.buffer(_size(spec, self._buckets[-1])) for spec in specs]
            for specs in (self._inputs, self._outputs)
        )
        return _Slot(inputs, outputs)

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

    def _run(self, slot: _Slot, shapes: Sequence[Shape], rows: int) -> Arrays:
        """In the executor: runs a batch and brings its outputs."""
        try:
            session = self._session
            if session is None:
                raise RuntimeError("the engine is closed")
            binding = session.io_binding()
            for spec, shape, buffer in zip(self._inputs, shapes, slot.inputs, strict=True):
                binding.bind_input(*self._bound(spec, shape, buffer))
            outputs = [
                buffer.view((shapes[0][0], *(size or 0 for size in spec.shape[1:])), np.dtype(spec.dtype))
                for spec, buffer in zip(self._outputs, slot.outputs, strict=True)
            ]
            for spec, output, buffer in zip(self._outputs, outputs, slot.outputs, strict=True):
                binding.bind_output(*self._bound(spec, output.shape, buffer))
            session.run_with_iobinding(binding, self._options)
            for spec, output, buffer in zip(self._outputs, outputs, slot.outputs, strict=True):
                if spec.name not in self._on_host:
                    self._memory.download(buffer, output.nbytes)
            self._memory.finish()
            return tuple(output[:rows].copy() for output in outputs)
        finally:
            self._free.append(slot)

    def _bound(self, spec: TensorSpec, shape: Shape, buffer: HostDeviceBuffer) -> tuple[str, str, int, Any, Shape, int]:
        """The arguments of ONNX Runtime's bind_input and bind_output."""
        dtype = np.dtype(spec.dtype).type
        if spec.name in self._on_host:
            return spec.name, "cpu", 0, dtype, shape, buffer.host.ctypes.data
        return spec.name, "cuda", self._memory.index, dtype, shape, buffer.address


def _on_host(session: Session) -> frozenset[str]:
    """The inputs and outputs that kernels of the CPU read and write."""
    inputs = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    outputs = zip(session.get_outputs(), session.get_output_memory_infos(), strict=True)
    return frozenset(tensor.name for tensor, memory in (*inputs, *outputs) if memory.name != "Cuda")


def _size(spec: TensorSpec, rows: int) -> int:
    """Bytes of `rows` rows, free dimensions counted as one: buffers grow when they have to."""
    return rows * np.dtype(spec.dtype).itemsize * math.prod(size or 1 for size in spec.shape[1:])
