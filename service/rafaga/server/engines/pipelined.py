"""The engine for devices, and for large models on the CPU: buffers that exist once, and one batch ahead of the other.

Two slots, each with buffers for a batch of the largest size. While the batch in one runs, the next is assembled and
sent in the other. Rows are padded to a bucket where the device wants few different shapes. The outputs' shapes must be
known but for the rows; a model for which they are not is run by `PaddedEngine`.
"""

from __future__ import annotations

import queue
import threading
import traceback
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from rafaga.bundle import TensorSpec
from rafaga.server.engines.device_memory import Copy, Memory, Ticket, Twin
from rafaga.server.engines.onnxruntime import CLOSED, Described, Engine, Samples, Session
from rafaga.server.engines.shared_lock import Gate
from rafaga.server.scheduling.job import Arrays, Part
from rafaga.server.scheduling.latency import LatencyTable

SLOTS = 2
"""Batches whose buffers exist."""
# Shapes whose bindings are kept, for models whose inputs have free dimensions.
_MAX_BINDINGS = 256
# ONNX Runtime runs a shape twice before it captures it; the third run is the first replay.
_CAPTURE_RUNS = 3
# A graph that is no faster than this is not worth what it keeps of the device's memory.
_WORTHWHILE = 0.98
_SKIP_GRAPH = "-1"

Value = TypeVar("Value")
Shape = tuple[int, ...]


class Named(Protocol):
    """An input or output, or the memory that it is expected in: "Cpu", "Cuda", "CudaPinned"."""

    @property
    def name(self) -> str: ...


class Binding(Protocol):
    """The part of onnxruntime.IOBinding that is used here."""

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: object, shape: Shape, buffer_ptr: int
    ) -> None: ...

    def bind_output(
        self, name: str, device_type: str, device_id: int, element_type: object, shape: Shape, buffer_ptr: int
    ) -> None: ...


class BindingSession(Session, Protocol):
    """The part of onnxruntime.InferenceSession that is used here; tests bring their own."""

    def get_inputs(self) -> Sequence[Named]: ...

    def get_outputs(self) -> Sequence[Named]: ...

    def get_input_memory_infos(self) -> Sequence[Named]: ...

    def get_output_memory_infos(self) -> Sequence[Named]: ...

    def io_binding(self) -> Binding: ...

    def run_with_iobinding(self, iobinding: Any, run_options: ort.RunOptions | None = None) -> None: ...


class Lane:
    """One thread that makes all runs of one session: a CUDA graph belongs to the thread that captured it."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def post(self, call: Callable[[], Value]) -> Future[Value]:
        future: Future[Value] = Future()
        self._calls.put((call, future))
        return future

    def close(self, timeout_s: float) -> bool:
        """Ends after what was posted; whether it did in time."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            try:
                result = call()
            except BaseException as error:  # whoever waits for the future gets it
                future.set_exception(error)
            else:
                future.set_result(result)
            del item, call, future  # what they hold must not wait for the next


@dataclass(eq=False)
class Slot:
    """Buffers for one batch; `bindings` by the shapes that are bound to them."""

    ticket: Ticket
    inputs: list[Twin]
    outputs: list[Twin]
    bindings: dict[tuple[Shape, ...], Binding] = field(default_factory=dict)


@dataclass(frozen=True)
class Flight:
    """A batch under way: `rows` of `bucket` are somebody's. `landed`: its outputs are there, in the slot's buffers."""

    slot: Slot
    rows: int
    bucket: int
    landed: Future[Arrays]


def fits(model: Described) -> bool:
    """Whether a model can be run by `BoundEngine`: it takes batches, and its outputs' shapes are known."""
    known = all(size is not None for spec in model.outputs for size in spec.shape[1:])
    return model.max_batch_size > 0 and known and not any(s.dtype == "object" for s in (*model.inputs, *model.outputs))


class BoundEngine(Engine):
    """`begin` and `finish` from one thread, at most `depth` flights at a time; `run` is both.

    `buckets`: the batch sizes that are run, the largest last; `exact`: any size up to it is run as it comes.
    """

    depth = SLOTS

    def __init__(
        self,
        model: Described,
        session: BindingSession,
        memory: Memory,
        buckets: Sequence[int],
        exact: bool = False,
    ) -> None:
        super().__init__(model, session)
        self._inputs, self._outputs = model.inputs, model.outputs
        self._dtypes = tuple(np.dtype(spec.dtype) for spec in model.inputs)
        self._bound: BindingSession | None = session
        self._memory = memory
        self._gate: Gate | None = None
        self._grow: Callable[[int], None] = lambda _: None
        # What a kernel of the CPU reads or writes stays on the host: ONNX Runtime would copy such an input once, when
        # it is bound, and never again.
        self._on_host = frozenset[str]() if memory.unified else _on_host(session)
        self._buckets = tuple(buckets)
        self._exact = exact
        self._graphs: dict[tuple[int, int], ort.RunOptions] = {}  # by slot and bucket: those that won
        if memory.stream:
            # Results are waited for by event, so that the next batch can be sent before this one is done.
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self._options.add_run_config_entry("gpu_graph_id", _SKIP_GRAPH)
        self._slots = tuple(self._slot() for _ in range(SLOTS))
        self._free = list(self._slots)
        self._lane = Lane(f"device-{model.name}")
        # Who waits for a device must not keep the next batch from being sent to it.
        self._waiting = self._lane if memory.unified else Lane(f"landing-{model.name}")

    def run(self, inputs: Arrays) -> Arrays:
        """As `Engine.run`; more rows than the largest bucket take several runs."""
        most = self._buckets[-1]
        pieces = [
            self.finish(self._begin([tuple(a[at : at + most] for a in inputs)]))
            for at in range(0, len(inputs[0]), most)
        ]
        return pieces[0] if len(pieces) == 1 else tuple(np.concatenate(p) for p in zip(*pieces, strict=True))

    def begin(self, parts: Sequence[Part]) -> Flight:
        """Copies the rows into a free slot, and has them sent and run. Rows of different lengths are padded with zeros
        on the right, as by `assemble`."""
        whole = [
            job.inputs if stop - start == job.rows else tuple(a[start:stop] for a in job.inputs)
            for job, start, stop in parts
        ]
        return self._begin(whole)

    def finish(self, flight: Flight) -> Arrays:
        """Waits for the outputs: one array each, [rows, ...], nobody else's. Raises whatever kept them from coming."""
        try:
            outputs = flight.landed.result()
            if self._memory.unified:
                return outputs if flight.rows == flight.bucket else tuple(o[: flight.rows] for o in outputs)
            return tuple(o[: flight.rows].copy() for o in outputs)
        finally:
            self._free.append(flight.slot)
            del flight  # its error's traceback holds this frame: a ring that would keep the buffers

    def join(self, gate: Gate) -> None:
        """From now on others run on the device, and may have to be alone there."""
        self._gate = gate

    def on_growth(self, call: Callable[[int], None]) -> None:
        """From now on `call` is told of bytes before buffers grow by them, and raises where there is no room. A batch
        that needs them then fails; others do not."""
        self._grow = call

    @property
    def resident(self) -> bool:
        """Whether every input is read on the device: what a CUDA graph needs to see."""
        return not any(spec.name in self._on_host for spec in self._inputs)

    def terminate(self) -> None:
        super().terminate()
        for options in self._graphs.values():
            options.terminate = True

    def warm_up(self, samples: Samples, max_batch_size: int) -> LatencyTable:
        """As `Engine.warm_up`; the slots take turns."""
        return self._table(samples, self._buckets, stepped=not self._exact)

    def try_graphs(self, samples: Samples, gate: Gate, always: bool = False) -> tuple[int, ...]:
        """Captures a CUDA graph for every bucket and slot, alone behind `gate`, and keeps those that are faster than
        the plain run.

        Gives the buckets that are replayed from now on. Raises whatever ONNX Runtime raises when it cannot capture.
        """
        won: list[int] = []
        for bucket in self._buckets:
            rows = samples.tiled(bucket)
            plain = self.seconds(samples, bucket)
            graphs = {(at, bucket): self._graph_options(at, bucket) for at in range(SLOTS)}
            self._graphs |= graphs
            with gate.alone():
                for _ in range(_CAPTURE_RUNS * SLOTS):  # the slots take turns
                    self.run(rows)
            replayed = self.seconds(samples, bucket)
            if always or replayed < _WORTHWHILE * plain:
                won.append(bucket)
            else:
                for key in graphs:
                    del self._graphs[key]
        return tuple(won)

    def close(self, timeout_s: float = 10.0) -> bool:
        """Gives the device's memory back; False, and nothing given back, when a run does not end."""
        if not self._lane.close(timeout_s) or not self._waiting.close(timeout_s):
            return False
        with self._gate.shared() if self._gate is not None else nullcontext():
            # In this order: a session lives no longer than the stream it runs on. Its end frees memory of the device
            # too, which a capture forbids.
            for slot in self._slots:
                slot.bindings.clear()
            self._bound = None
            self._graphs.clear()
            self._session = CLOSED
            self._memory.close()
        return super().close(timeout_s)

    def _slot(self) -> Slot:
        most = self._buckets[-1]
        outputs = [] if self._memory.unified else [self._memory.twin(_size(s, most)) for s in self._outputs]
        return Slot(self._memory.ticket(), [self._memory.twin(_size(s, most)) for s in self._inputs], outputs)

    def _begin(self, blocks: Sequence[Arrays]) -> Flight:
        rows = sum(len(block[0]) for block in blocks)
        bucket = rows if self._exact else self._buckets[bisect_left(self._buckets, rows)]
        slot = self._free.pop(0)
        if self._gate is not None:
            self._gate.enter()
        try:
            shapes = tuple(
                self._fill(slot, at, [block[at] for block in blocks], bucket) for at in range(len(self._inputs))
            )
            # From here and not from the lane, which ONNX Runtime may hold until the batch before is done.
            self._memory.upload(self._copies(slot, shapes), slot.ticket)
        except BaseException:
            if self._gate is not None:
                self._gate.leave()
            self._free.append(slot)
            raise
        landed: Future[Arrays] = Future()
        if self._gate is not None:
            gate = self._gate
            landed.add_done_callback(lambda _: gate.leave())
        self._lane.post(partial(self._fly, slot, shapes, bucket, landed))
        return Flight(slot, rows, bucket, landed)

    def _fill(self, slot: Slot, at: int, blocks: Sequence[NDArray[np.generic]], bucket: int) -> Shape:
        """Writes one input's rows into the slot; gives the shape that is run. The last row fills up the bucket: it is
        as valid as the others, which zeros may not be."""
        tails = {block.shape[1:] for block in blocks}
        tail = next(iter(tails)) if len(tails) == 1 else tuple(map(max, zip(*tails, strict=True)))
        shape = (bucket, *tail)
        dtype = self._dtypes[at]
        view = self._room(slot, at, shape).view(shape, dtype)
        row = 0
        for block in blocks:
            end = row + len(block)
            if block.shape[1:] != tail:
                view[row:end] = 0
            view[(slice(row, end), *(slice(size) for size in block.shape[1:]))] = block
            row = end
        if row < bucket:
            view[row:] = view[row - 1]
        return shape

    def _room(self, slot: Slot, at: int, shape: Shape) -> Twin:
        """The slot's buffer for input `at`, made larger where free dimensions have grown."""
        twin = slot.inputs[at]
        size = self._dtypes[at].itemsize * int(np.prod(shape, dtype=np.int64))
        if size > len(twin.host):
            more = 2 * size - len(twin.host)
            self._grow(more)
            try:
                larger = self._memory.twin(2 * size)
            except BaseException:
                self._grow(-more)
                raise
            slot.bindings.clear()
            self._memory.release(twin)
            twin = slot.inputs[at] = larger
        return twin

    def _fly(self, slot: Slot, shapes: tuple[Shape, ...], bucket: int, landed: Future[Arrays]) -> None:
        """On the lane: sends a batch, and has somebody wait for it."""
        try:
            outputs = self._send(slot, shapes, bucket)
        except BaseException as error:  # whoever waits for the flight gets it
            # But not what the failed calls held: the session and its bindings, which the error would keep alive past
            # their stream.
            traceback.clear_frames(error.__traceback__)
            landed.set_exception(error)
            del landed  # the error's traceback holds this frame: a ring
            return
        if self._memory.unified:
            landed.set_result(outputs)
        else:
            self._waiting.post(partial(self._land, slot, outputs, landed))

    def _land(self, slot: Slot, outputs: Arrays, landed: Future[Arrays]) -> None:
        try:
            self._memory.wait(slot.ticket)
        except BaseException as error:
            landed.set_exception(error)
            del landed  # as in `_fly`
        else:
            landed.set_result(outputs)

    def _send(self, slot: Slot, shapes: tuple[Shape, ...], bucket: int) -> Arrays:
        """On the lane: run, down. On a GPU it only says so, and may return before any of it is done."""
        session, memory = self._bound, self._memory
        if session is None:
            raise RuntimeError("the engine is closed")
        binding = self._binding(session, slot, shapes, bucket)
        if memory.unified:
            # Answers are handed out as they are, so every batch gets arrays of its own.
            outputs = tuple(np.empty((bucket, *_tail(spec)), spec.dtype) for spec in self._outputs)
            for spec, output in zip(self._outputs, outputs, strict=True):
                dtype = output.dtype.type
                binding.bind_output(spec.name, memory.device, memory.index, dtype, output.shape, output.ctypes.data)
        else:
            outputs = tuple(
                twin.view((bucket, *_tail(spec)), np.dtype(spec.dtype))
                for twin, spec in zip(slot.outputs, self._outputs, strict=True)
            )
        memory.arrive(slot.ticket)
        options = self._graphs.get((self._slots.index(slot), bucket), self._options) if self._graphs else self._options
        session.run_with_iobinding(binding, options)
        downloads = zip(self._outputs, slot.outputs, outputs, strict=False)
        memory.download(
            [Copy(twin, o.nbytes) for spec, twin, o in downloads if spec.name not in self._on_host], slot.ticket
        )
        return outputs

    def _copies(self, slot: Slot, shapes: tuple[Shape, ...]) -> list[Copy]:
        """Of the inputs that are read on the device."""
        sizes = (d.itemsize * int(np.prod(s, dtype=np.int64)) for d, s in zip(self._dtypes, shapes, strict=True))
        tensors = zip(self._inputs, slot.inputs, sizes, strict=True)
        return [Copy(twin, size) for spec, twin, size in tensors if spec.name not in self._on_host]

    def _binding(self, session: BindingSession, slot: Slot, shapes: tuple[Shape, ...], bucket: int) -> Binding:
        binding = slot.bindings.get(shapes)
        if binding is not None:
            return binding
        if len(slot.bindings) >= _MAX_BINDINGS:
            del slot.bindings[next(iter(slot.bindings))]
        binding = slot.bindings[shapes] = session.io_binding()
        memory = self._memory
        for spec, dtype, shape, twin in zip(self._inputs, self._dtypes, shapes, slot.inputs, strict=True):
            if spec.name in self._on_host:
                binding.bind_input(spec.name, "cpu", 0, dtype.type, shape, twin.host.ctypes.data)
            else:
                binding.bind_input(spec.name, memory.device, memory.index, dtype.type, shape, twin.address)
        for spec, twin in zip(self._outputs, slot.outputs, strict=False):
            self._bind_output(binding, spec, (bucket, *_tail(spec)), twin)
        return binding

    def _bind_output(self, binding: Binding, spec: TensorSpec, shape: Shape, twin: Twin) -> None:
        dtype = np.dtype(spec.dtype).type
        if spec.name in self._on_host:
            binding.bind_output(spec.name, "cpu", 0, dtype, shape, twin.host.ctypes.data)
        else:
            binding.bind_output(spec.name, self._memory.device, self._memory.index, dtype, shape, twin.address)

    def _graph_options(self, slot: int, bucket: int) -> ort.RunOptions:
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options.add_run_config_entry("gpu_graph_id", str(1 + slot + SLOTS * self._buckets.index(bucket)))
        return options


class PaddedEngine(Engine):
    """On a device, but not bound: outputs' shapes are not known before the run, so ONNX Runtime makes the copies."""

    def __init__(self, model: Described, session: Session, memory: Memory, buckets: Sequence[int]) -> None:
        super().__init__(model, session)
        self._memory = memory
        self._buckets = tuple(buckets)
        self._gate = Gate()  # its own, until it joins others

    def join(self, gate: Gate) -> None:
        """As `BoundEngine.join`."""
        self._gate = gate

    def on_growth(self, call: Callable[[int], None]) -> None:
        """Never: ONNX Runtime allocates for itself, within its arena's limit."""

    def run(self, inputs: Arrays) -> Arrays:
        rows = len(inputs[0])
        with self._gate.shared():
            if not self._batched or rows > self._buckets[-1]:
                return super().run(inputs)
            bucket = self._buckets[bisect_left(self._buckets, rows)]
            if bucket == rows:
                return super().run(inputs)
            padded = tuple(np.concatenate((a, np.repeat(a[-1:], bucket - rows, axis=0))) for a in inputs)
            return tuple(o[:rows] for o in super().run(padded))

    def warm_up(self, samples: Samples, max_batch_size: int) -> LatencyTable:
        return self._table(samples, self._buckets, stepped=True)

    def close(self, timeout_s: float = 10.0) -> bool:
        with self._gate.shared():
            self._session = CLOSED
            self._memory.close()
        return super().close(timeout_s)


def _on_host(session: BindingSession) -> frozenset[str]:
    inputs = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    outputs = zip(session.get_outputs(), session.get_output_memory_infos(), strict=True)
    return frozenset(tensor.name for tensor, memory in (*inputs, *outputs) if memory.name != "Cuda")


def _tail(spec: TensorSpec) -> Shape:
    return tuple(size or 0 for size in spec.shape[1:])


def _size(spec: TensorSpec, rows: int) -> int:
    """Bytes of `rows` rows, free dimensions counted as one: buffers grow as they need to."""
    return rows * np.dtype(spec.dtype).itemsize * int(np.prod([size or 1 for size in spec.shape[1:]], dtype=np.int64))
