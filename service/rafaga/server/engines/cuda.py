"""The few functions of CUDA's runtime that batches on a GPU need: a stream, page-locked memory, copies.

ONNX Runtime's Python interface can neither lock pages nor copy in the background. The runtime library is installed
wherever its CUDA provider loads.
"""

from __future__ import annotations

import ctypes

import onnxruntime as ort

from rafaga.errors import DeviceError, DeviceMemoryError

_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation
_NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the legacy default stream
_BLOCKING_SYNC = 4  # cudaDeviceScheduleBlockingSync: waiting sleeps and does not spin
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind

_SIGNATURES: dict[str, tuple[type, ...]] = {
    "cudaSetDevice": (ctypes.c_int,),
    "cudaSetDeviceFlags": (ctypes.c_uint,),
    "cudaMemGetInfo": (ctypes.c_void_p, ctypes.c_void_p),
    "cudaMalloc": (ctypes.c_void_p, ctypes.c_size_t),
    "cudaFree": (ctypes.c_void_p,),
    "cudaHostRegister": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint),
    "cudaHostUnregister": (ctypes.c_void_p,),
    "cudaStreamCreateWithFlags": (ctypes.c_void_p, ctypes.c_uint),
    "cudaStreamDestroy": (ctypes.c_void_p,),
    "cudaStreamSynchronize": (ctypes.c_void_p,),
    "cudaMemcpyAsync": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p),
}


def cuda_major_version() -> str:
    """Of the CUDA that ONNX Runtime was built with."""
    return str(ort.cuda_version or "13").partition(".")[0]


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
        self._call("cudaSetDeviceFlags", _BLOCKING_SYNC)

    @classmethod
    def load(cls, index: int) -> Cuda:
        """Initialises CUDA on a GPU. Raises DeviceError when the library does not load, the GPU is too old, busy, full
        or broken, or its driver is. Call devices.preload first."""
        name = f"libcudart.so.{cuda_major_version()}"
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            raise DeviceError(f"cuda:{index}: cannot load {name}: {error}") from None
        return cls(library, index)

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

    def stream(self) -> int:
        """The address of a new stream, on which work runs in the order it was started."""
        return self._created("cudaStreamCreateWithFlags", _NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def finish(self, stream: int) -> None:
        """Waits until all work on `stream` is done. Raises DeviceError if any of it failed."""
        self._call("cudaStreamSynchronize", stream)

    def upload(self, device: int, host: int, size: int, stream: int) -> None:
        self._call("cudaMemcpyAsync", device, host, size, _TO_DEVICE, stream)

    def download(self, host: int, device: int, size: int, stream: int) -> None:
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
