"""The memory that batches travel through: page-locked on the host, as much on the GPU, and the copies between them.

host (assembled here)  --upload-->  device  --run-->  device  --download-->  host (answered from here)
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rafaga.errors import DeviceError
from rafaga.server.engines.cuda import Cuda


class HostDeviceBuffer(NamedTuple):
    """Bytes on the host, and the address of as many on the device."""

    host: NDArray[np.uint8]
    address: int

    def view(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """The first bytes on the host as an array."""
        return self.host[: dtype.itemsize * math.prod(shape)].view(dtype).reshape(shape)


class CudaMemory:
    """One engine's buffers and its stream on one GPU. on_close: called once everything is released."""

    def __init__(self, cuda: Cuda, on_close: Callable[[], None] = lambda: None) -> None:
        """Raises DeviceError."""
        self.index = cuda.index
        self.stream = cuda.stream()
        self._cuda = cuda
        self._on_close = on_close
        self._buffers: dict[int, HostDeviceBuffer] = {}

    def buffer(self, size: int) -> HostDeviceBuffer:
        """Raises DeviceError."""
        # Whole pages, because pages are what is locked.
        host = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        address = self._cuda.allocate(len(host))
        try:
            self._cuda.lock(host.ctypes.data, len(host))
        except DeviceError:
            self._cuda.free(address)
            raise
        buffer = self._buffers[address] = HostDeviceBuffer(host, address)
        return buffer

    def release(self, buffer: HostDeviceBuffer) -> None:
        del self._buffers[buffer.address]
        self._cuda.unlock(buffer.host.ctypes.data)
        self._cuda.free(buffer.address)

    def upload(self, buffer: HostDeviceBuffer, size: int) -> None:
        """Starts a copy of the first `size` bytes. Later runs on `stream` wait for it, the caller does not."""
        self._cuda.upload(buffer.address, buffer.host.ctypes.data, size, self.stream)

    def download(self, buffer: HostDeviceBuffer, size: int) -> None:
        """Starts a copy of the first `size` bytes, which waits for earlier runs on `stream`."""
        self._cuda.download(buffer.host.ctypes.data, buffer.address, size, self.stream)

    def finish(self) -> None:
        """Waits for all copies and runs. Raises DeviceError if one failed."""
        self._cuda.finish(self.stream)

    def close(self) -> None:
        """Releases everything. No copy and no run may be in progress."""
        if not self.stream:
            return
        # After some errors CUDA refuses every call: what can still be released is.
        with contextlib.suppress(DeviceError):
            self.finish()
        for buffer in list(self._buffers.values()):
            with contextlib.suppress(DeviceError):
                self.release(buffer)
        with contextlib.suppress(DeviceError):
            self._cuda.destroy_stream(self.stream)
        self.stream = 0
        self._on_close()
