"""The few functions of CUDA's runtime that batches on a GPU need: streams, events, page-locked memory, copies.

ONNX Runtime's Python interface can neither lock pages nor copy during a run. The runtime library is installed wherever
its CUDA provider loads, and these functions have had the same signatures since CUDA 4.
"""

from __future__ import annotations

import ctypes
from typing import NewType

import onnxruntime as ort

from rafaga.errors import DeviceError, DeviceMemoryError

Stream = NewType("Stream", int)
Event = NewType("Event", int)

_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation
_NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the legacy default stream
_NO_TIMING_BLOCKING_SYNC = 3  # cudaEventDisableTiming | cudaEventBlockingSync: waiting sleeps
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind

_SIGNATURES: dict[str, tuple[type, ...]] = {
    "cudaSetDevice": (ctypes.c_int,),
    "cudaMemGetInfo": (ctypes.c_void_p, ctypes.c_void_p),
    "cudaMalloc": (ctypes.c_void_p, ctypes.c_size_t),
    "cudaFree": (ctypes.c_void_p,),
    "cudaHostRegister": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint),
    "cudaHostUnregister": (ctypes.c_void_p,),
    "cudaStreamCreateWithFlags": (ctypes.c_void_p, ctypes.c_uint),
    "cudaStreamDestroy": (ctypes.c_void_p,),
    "cudaStreamSynchronize": (ctypes.c_void_p,),
    "cudaStreamWaitEvent": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint),
    "cudaEventCreateWithFlags": (ctypes.c_void_p, ctypes.c_uint),
    "cudaEventDestroy": (ctypes.c_void_p,),
    "cudaEventRecord": (ctypes.c_void_p, ctypes.c_void_p),
    "cudaEventSynchronize": (ctypes.c_void_p,),
    "cudaMemcpyAsync": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p),
}


class Cuda:
    """One GPU. Methods may be called from any thread, release the interpreter lock, and raise DeviceError."""

    def __init__(self, library: ctypes.CDLL, index: int) -> None:
        self.index = index
        self._library = library
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        library.cudaGetErrorString.argtypes = (ctypes.c_int,)
        library.cudaGetErrorString.restype = ctypes.c_char_p

    @classmethod
    def load(cls, index: int) -> Cuda:
        """Raises DeviceError when the library does not load. Call devices.preload first."""
        name = f"libcudart.so.{str(ort.cuda_version or '13').partition('.')[0]}"
        try:
            return cls(ctypes.CDLL(name), index)
        except OSError as error:
            raise DeviceError(f"cuda:{index}: cannot load {name}: {error}") from None

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        """The address of `size` bytes on the device."""
        return self._created("cudaMalloc", size)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def lock(self, address: int, size: int) -> None:
        """Locks pages of the host: only with them copies run in the background."""
        self._call("cudaHostRegister", address, size, 0)

    def unlock(self, address: int) -> None:
        self._call("cudaHostUnregister", address)

    def stream(self) -> Stream:
        return Stream(self._created("cudaStreamCreateWithFlags", _NON_BLOCKING))

    def destroy_stream(self, stream: Stream) -> None:
        self._call("cudaStreamDestroy", stream)

    def finish(self, stream: Stream) -> None:
        """Waits until all work on `stream` is done."""
        self._call("cudaStreamSynchronize", stream)

    def event(self) -> Event:
        return Event(self._created("cudaEventCreateWithFlags", _NO_TIMING_BLOCKING_SYNC))

    def destroy_event(self, event: Event) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: Event, stream: Stream) -> None:
        """`event` happens when the work that is on `stream` now is done."""
        self._call("cudaEventRecord", event, stream)

    def await_on(self, stream: Stream, event: Event) -> None:
        """Later work on `stream` starts after `event`."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def wait(self, event: Event) -> None:
        self._call("cudaEventSynchronize", event)

    def upload(self, device: int, host: int, size: int, stream: Stream) -> None:
        self._call("cudaMemcpyAsync", device, host, size, _TO_DEVICE, stream)

    def download(self, host: int, device: int, size: int, stream: Stream) -> None:
        self._call("cudaMemcpyAsync", host, device, size, _TO_HOST, stream)

    def _created(self, function: str, argument: int) -> int:
        made = ctypes.c_void_p()
        self._call(function, ctypes.byref(made), argument)
        return int(made.value or 0)

    def _call(self, function: str, *arguments: object) -> None:
        # Each thread has a current device, and other code may have set another.
        self._check("cudaSetDevice", self._library.cudaSetDevice(self.index))
        self._check(function, getattr(self._library, function)(*arguments))

    def _check(self, function: str, status: int) -> None:
        if status:
            text = f"cuda:{self.index}: {function}: {self._library.cudaGetErrorString(status).decode()} ({status})"
            raise DeviceMemoryError(text) if status == _MEMORY_ALLOCATION else DeviceError(text)
