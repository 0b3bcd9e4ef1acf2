"""A simulated GPU: CUDA's runtime library in Python, and ONNX Runtime's CPU sessions as if they ran on streams.

Work on a stream is done when something waits for it and not before, as late as a real device could be. Device memory is
separate memory, filled with a pattern, so that reading before a copy gives wrong values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort

from rafaga.server.engines.cuda import Cuda
from rafaga.server.engines.devices import Gpu
from rafaga.server.engines.rows import Shape

POISON = 0xEE
GPU = Gpu(0, "NVIDIA Pretend 9000", (9, 0))


@dataclass
class FakeCudart:
    """`library` is what ctypes would have loaded; `refuses` names functions that fail, with their error code."""

    total: int = 2**30
    refuses: dict[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    memory: dict[int, ctypes.Array[ctypes.c_char]] = field(default_factory=dict)
    locked: dict[int, int] = field(default_factory=dict)
    streams: dict[int, list[Callable[[], object]]] = field(default_factory=dict)
    _handle: int = 1000

    @property
    def used(self) -> int:
        return sum(len(block) for block in self.memory.values())

    @property
    def library(self) -> Any:
        def function(name: str, *kinds: Any) -> tuple[str, Any]:
            def call(*arguments: Any) -> int:
                self.calls.append(name)
                if name in self.refuses:
                    return self.refuses[name]
                return int(getattr(self, "_" + name)(*arguments) or 0)

            return name, ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(call)

        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        functions = dict(
            [
                function("cudaSetDevice", number),
                function("cudaSetDeviceFlags", ctypes.c_uint),
                function("cudaMemGetInfo", pointer, pointer),
                function("cudaMalloc", pointer, size),
                function("cudaFree", pointer),
                function("cudaHostRegister", pointer, size, ctypes.c_uint),
                function("cudaHostUnregister", pointer),
                function("cudaStreamCreateWithFlags", pointer, ctypes.c_uint),
                function("cudaStreamDestroy", pointer),
                function("cudaStreamSynchronize", pointer),
                function("cudaMemcpyAsync", pointer, pointer, size, number, pointer),
            ]
        )
        return SimpleNamespace(**functions, cudaGetErrorString=_ErrorString())

    def cuda(self, index: int = 0) -> Cuda:
        return Cuda(self.library, index)

    def enqueue(self, stream: int, work: Callable[[], object]) -> None:
        self.streams[stream].append(work)

    def _cudaSetDevice(self, index: int) -> None:  # noqa: N802
        assert index == 0

    def _cudaSetDeviceFlags(self, flags: int) -> None:  # noqa: N802
        assert flags == 4

    def _cudaMemGetInfo(self, free: int, total: int) -> None:  # noqa: N802
        ctypes.c_size_t.from_address(free).value = self.total - self.used
        ctypes.c_size_t.from_address(total).value = self.total

    def _cudaMalloc(self, where: int, size: int) -> int:  # noqa: N802
        if size > self.total - self.used:
            return 2
        block = ctypes.create_string_buffer(bytes([POISON]) * size, size)
        address = ctypes.addressof(block)
        self.memory[address] = block
        ctypes.c_void_p.from_address(where).value = address
        return 0

    def _cudaFree(self, address: int) -> None:  # noqa: N802
        del self.memory[address]

    def _cudaHostRegister(self, address: int, size: int, flags: int) -> None:  # noqa: N802
        assert address % 4096 == 0, "pages are locked whole"
        assert address not in self.locked
        self.locked[address] = size

    def _cudaHostUnregister(self, address: int) -> None:  # noqa: N802
        del self.locked[address]

    def _cudaStreamCreateWithFlags(self, where: int, flags: int) -> None:  # noqa: N802
        assert flags == 1
        self._handle += 1
        ctypes.c_void_p.from_address(where).value = self._handle
        self.streams[self._handle] = []

    def _cudaStreamDestroy(self, stream: int) -> None:  # noqa: N802
        del self.streams[stream]

    def _cudaStreamSynchronize(self, stream: int) -> None:  # noqa: N802
        work = self.streams[stream]
        while work:
            work.pop(0)()

    def _cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> None:  # noqa: N802
        on_device = to if kind == 1 else source
        block = next(start for start, b in self.memory.items() if start <= on_device < start + len(b))
        assert on_device + size <= block + len(self.memory[block]), "a copy past the end of its buffer"
        self.enqueue(stream, partial(ctypes.memmove, to, source, size))


class _ErrorString:
    """In Python alone: a callback of ctypes must not give text."""

    argtypes: Any = ()
    restype: Any = None

    def __call__(self, status: int) -> bytes:
        return b"out of memory" if status == 2 else b"an error"


class FakeGpuSession:
    """A CPU session whose runs wait for their turn on `stream`. Buffers must be bound as the device's.

    cpu_inputs: inputs that a kernel of the CPU would read. before_run: called before every run.
    """

    def __init__(
        self, session: ort.InferenceSession, cudart: FakeCudart, stream: int, cpu_inputs: Sequence[str] = ()
    ) -> None:
        self._session, self._cudart, self._stream, self._cpu_inputs = session, cudart, stream, cpu_inputs
        self.shapes: list[tuple[Shape, ...]] = []
        self.before_run: Callable[[], object] = lambda: None

    def get_inputs(self) -> Sequence[Any]:
        return list(self._session.get_inputs())

    def get_outputs(self) -> Sequence[Any]:
        return list(self._session.get_outputs())

    def get_input_memory_infos(self) -> Sequence[Any]:
        return [SimpleNamespace(name="Cpu" if i.name in self._cpu_inputs else "Cuda") for i in self.get_inputs()]

    def get_output_memory_infos(self) -> Sequence[Any]:
        return [SimpleNamespace(name="Cuda") for _ in self.get_outputs()]

    def run(self, names: Any, feed: Any, options: Any = None) -> Any:
        self.shapes.append(tuple(a.shape for a in feed.values()))
        return self._session.run(names, feed, options)

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self._session, self._cudart)

    def run_with_iobinding(self, binding: FakeBinding, options: ort.RunOptions | None = None) -> None:
        assert options is not None
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self.before_run()
        self.shapes.append(tuple(binding.shapes.values()))
        self._cudart.enqueue(self._stream, lambda: self._session.run_with_iobinding(binding.real, ort.RunOptions()))


class FakeBinding:
    def __init__(self, session: ort.InferenceSession, cudart: FakeCudart) -> None:
        self.real = session.io_binding()
        self.shapes: dict[str, Shape] = {}
        self._cudart = cudart

    def bind_input(self, name: str, device: str, index: int, dtype: Any, shape: Shape, address: int) -> None:
        assert (address in self._cudart.memory) == (device == "cuda"), f"{name} is bound to the wrong device"
        self.shapes[name] = shape
        self.real.bind_input(name, "cpu", 0, dtype, shape, address)

    def bind_output(self, name: str, device: str, index: int, dtype: Any, shape: Shape, address: int) -> None:
        assert (address in self._cudart.memory) == (device == "cuda"), f"{name} is bound to the wrong device"
        self.real.bind_output(name, "cpu", 0, dtype, shape, address)
