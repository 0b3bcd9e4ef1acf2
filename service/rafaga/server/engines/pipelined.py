"""The engine for GPUs, and for large models on the CPU: buffers that exist once, and two batches in flight.

Two slots hold buffers for a batch of the largest size each. While the batch in one runs, the next is assembled and
uploaded in the other. Rows are padded to a bucket where the device should see few different shapes. The outputs' shapes
must be known except for the rows; other models are run by `SessionEngine`.
"""

from __future__ import annotations

import traceback
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort

from rafaga.bundle import TensorSpec
from rafaga.server.engines.contract import ModelSpec, PendingOutputs, failed
from rafaga.server.engines.device_memory import Copy, CudaEvents, HostDeviceBuffer, HostMemory
from rafaga.server.engines.onnxruntime import Session
from rafaga.server.engines.rows import Shape, blocks_of, joined_shape, write
from rafaga.server.engines.serial_executor import SerialExecutor
from rafaga.server.scheduling.job import Arrays, Part

DEPTH = 2
# Shapes whose bindings are kept, for models whose inputs have free dimensions.
_MAX_BINDINGS = 256


@dataclass(eq=False)
class _Slot:
    """Buffers for one batch; `bindings` by the shapes that are bound to them. outputs: () where they are not copied."""

    events: CudaEvents
    inputs: list[HostDeviceBuffer]
    outputs: tuple[HostDeviceBuffer, ...]
    bindings: dict[tuple[Shape, ...], Any] = field(default_factory=dict)


def has_known_outputs(model: ModelSpec) -> bool:
    """Whether `PipelinedEngine` can run a model: it takes batches, and its outputs' shapes are known."""
    known = all(size is not None for spec in model.outputs for size in spec.shape[1:])
    return model.max_batch_size > 0 and known and not any(s.dtype == "object" for s in (*model.inputs, *model.outputs))


class PipelinedEngine:
    """Implements `Engine`, for `has_known_outputs` models.

    `buckets`: the batch sizes that run, the largest last; `exact`: any size up to it runs without padding.
    """

    depth = DEPTH

    def __init__(
        self, model: ModelSpec, session: Session, memory: HostMemory, buckets: Sequence[int], exact: bool = False
    ) -> None:
        """Raises DeviceError when there is no memory for the buffers."""
        self._inputs, self._outputs = model.inputs, model.outputs
        self._session = session
        self._memory = memory
        # ONNX Runtime would copy an input that a CPU kernel reads to the host when it is bound, and never again.
        self._on_host = frozenset[str]() if memory.unified else _on_host(session)
        self._buckets = tuple(buckets)
        self._exact = exact
        self._options = ort.RunOptions()
        if memory.stream:
            # The download's event is waited for instead: that sleeps, where ONNX Runtime would spin.
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._free = deque(self._slot() for _ in range(DEPTH))
        self._executor = SerialExecutor(f"device-{model.name}")

    def submit(self, rows: Sequence[Part]) -> PendingOutputs:
        slot = self._free.popleft()
        count = sum(part.stop - part.start for part in rows)
        try:
            bucket = count if self._exact else self._buckets[bisect_left(self._buckets, count)]
            shapes = tuple(self._fill(slot, index, rows, bucket) for index in range(len(self._inputs)))
            # Here and not in the executor, which waits for the batch before.
            self._memory.upload(self._uploads(slot, shapes), slot.events)
        except Exception as error:
            self._free.append(slot)
            return failed(error)
        outputs: Future[Arrays] = Future()
        self._executor.post(partial(self._complete, slot, shapes, count, outputs))
        return outputs

    def terminate(self) -> None:
        """As `SessionEngine.terminate`."""
        self._options.terminate = True

    def close(self, timeout_s: float = 10.0) -> bool:
        if not self._executor.close(timeout_s):
            return False
        # In this order: a session must not outlive the stream it runs on.
        for slot in self._free:
            slot.bindings.clear()
        self._session = None
        self._memory.close()
        return True

    def _slot(self) -> _Slot:
        most, memory = self._buckets[-1], self._memory
        inputs = [memory.buffer(_size(spec, most)) for spec in self._inputs]
        # On the CPU answers are handed out as they are, so every batch gets arrays of its own.
        outputs = () if memory.unified else tuple(memory.buffer(_size(spec, most)) for spec in self._outputs)
        return _Slot(memory.events(), inputs, outputs)

    def _fill(self, slot: _Slot, index: int, rows: Sequence[Part], bucket: int) -> Shape:
        """Writes one input's rows into the slot; gives the shape of the batch."""
        blocks = blocks_of(rows, index)
        shape, dtype = joined_shape(blocks, bucket), np.dtype(self._inputs[index].dtype)
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if size > len(slot.inputs[index].host):  # free dimensions have grown
            larger = self._memory.buffer(2 * size)
            slot.bindings.clear()
            self._memory.release(slot.inputs[index])
            slot.inputs[index] = larger
        write(blocks, slot.inputs[index].view(shape, dtype))
        return shape

    def _uploads(self, slot: _Slot, shapes: tuple[Shape, ...]) -> list[Copy]:
        """The inputs that are read on the device."""
        return [
            Copy(buffer, np.dtype(spec.dtype).itemsize * int(np.prod(shape, dtype=np.int64)))
            for spec, buffer, shape in zip(self._inputs, slot.inputs, shapes, strict=True)
            if spec.name not in self._on_host
        ]

    def _complete(self, slot: _Slot, shapes: tuple[Shape, ...], rows: int, future: Future[Arrays]) -> None:
        """In the executor: runs a batch and brings its outputs."""
        try:
            outputs = self._run(slot, shapes, rows)
        except BaseException as error:
            # The frames of the failed calls hold the session and its bindings, which must not outlive their stream.
            traceback.clear_frames(error.__traceback__)
            self._free.append(slot)
            future.set_exception(error)
            del future  # the error's traceback holds this frame: a reference cycle
        else:
            self._free.append(slot)
            future.set_result(outputs)

    def _run(self, slot: _Slot, shapes: tuple[Shape, ...], rows: int) -> Arrays:
        session, memory, batch = self._session, self._memory, shapes[0][0]
        if session is None:
            raise RuntimeError("the engine is closed")
        binding = self._binding(session, slot, shapes)
        if memory.unified:
            outputs = tuple(np.empty(_shape(spec, batch), spec.dtype) for spec in self._outputs)
            for spec, output in zip(self._outputs, outputs, strict=True):
                binding.bind_output(spec.name, "cpu", 0, output.dtype.type, output.shape, output.ctypes.data)
            session.run_with_iobinding(binding, self._options)
            return tuple(output[:rows] for output in outputs)
        buffers = [
            buffer.view(_shape(spec, batch), np.dtype(spec.dtype))
            for spec, buffer in zip(self._outputs, slot.outputs, strict=True)
        ]
        memory.await_upload(slot.events)
        session.run_with_iobinding(binding, self._options)
        downloads = zip(self._outputs, slot.outputs, buffers, strict=True)
        copies = [Copy(buffer, view.nbytes) for spec, buffer, view in downloads if spec.name not in self._on_host]
        memory.download(copies, slot.events)
        return tuple(view[:rows].copy() for view in buffers)

    def _binding(self, session: Session, slot: _Slot, shapes: tuple[Shape, ...]) -> Any:
        binding = slot.bindings.get(shapes)
        if binding is not None:
            return binding
        if len(slot.bindings) >= _MAX_BINDINGS:
            del slot.bindings[next(iter(slot.bindings))]
        binding = slot.bindings[shapes] = session.io_binding()
        for spec, shape, buffer in zip(self._inputs, shapes, slot.inputs, strict=True):
            device, index, address = self._place(spec, buffer)
            binding.bind_input(spec.name, device, index, np.dtype(spec.dtype).type, shape, address)
        for spec, buffer in zip(self._outputs, slot.outputs, strict=False):
            device, index, address = self._place(spec, buffer)
            shape = _shape(spec, shapes[0][0])
            binding.bind_output(spec.name, device, index, np.dtype(spec.dtype).type, shape, address)
        return binding

    def _place(self, spec: TensorSpec, buffer: HostDeviceBuffer) -> tuple[str, int, int]:
        """Device, index and address that a tensor is bound to."""
        if spec.name in self._on_host:
            return "cpu", 0, buffer.host.ctypes.data
        return self._memory.device, self._memory.index, buffer.address


def _on_host(session: Session) -> frozenset[str]:
    """The inputs and outputs that kernels of the CPU read and write."""
    inputs = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    outputs = zip(session.get_outputs(), session.get_output_memory_infos(), strict=True)
    return frozenset(tensor.name for tensor, memory in (*inputs, *outputs) if memory.name != "Cuda")


def _shape(spec: TensorSpec, rows: int) -> Shape:
    """Of an output, whose dimensions are all known but the first."""
    return (rows, *(size or 0 for size in spec.shape[1:]))


def _size(spec: TensorSpec, rows: int) -> int:
    """Bytes of `rows` rows, free dimensions counted as one: buffers grow when they have to."""
    return rows * np.dtype(spec.dtype).itemsize * int(np.prod([size or 1 for size in spec.shape[1:]], dtype=np.int64))
