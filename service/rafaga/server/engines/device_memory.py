"""The memory that batches travel through: page-locked on the host, as much on the GPU, and the copies between them.

    host (assembled here)  --upload-->  device  --run-->  device  --download-->  host (answered from here)

On the CPU, host and device are the same memory and nothing is copied, so the engine above is the same for both.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rafaga.errors import DeviceError
from rafaga.server.engines.cuda import Cuda, Event, Stream


class HostDeviceBuffer(NamedTuple):
    """Bytes on the host, and the address of as many on the device."""

    host: NDArray[np.uint8]
    address: int

    def view(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """The first bytes on the host as an array."""
        size = dtype.itemsize
        for length in shape:
            size *= length
        return self.host[:size].view(dtype).reshape(shape)


class Copy(NamedTuple):
    """The first `size` bytes of a buffer."""

    buffer: HostDeviceBuffer
    size: int


class CudaEvents(NamedTuple):
    """What one batch waits for."""

    uploaded: Event
    completed: Event


class HostMemory:
    """The CPU's: nothing is copied, and Python frees what is not used any more. Subclasses do the work of the methods.

    device, index: where ONNX Runtime finds the buffers. stream: what sessions must run on; 0: any. unified: the device
    reads and writes the host's own memory.
    """

    device = "cpu"
    index = 0
    stream = 0
    unified = True

    def buffer(self, size: int) -> HostDeviceBuffer:
        """Raises DeviceError."""
        host = _pages(size)
        return HostDeviceBuffer(host, host.ctypes.data)

    def release(self, buffer: HostDeviceBuffer) -> None: ...

    def events(self) -> CudaEvents:
        return CudaEvents(Event(0), Event(0))

    def upload(self, copies: Sequence[Copy], events: CudaEvents) -> None:
        """Starts the copies. They run beside the batch that the device computes."""

    def await_upload(self, events: CudaEvents) -> None:
        """The next run on `stream` waits for the upload; the caller does not."""

    def download(self, copies: Sequence[Copy], events: CudaEvents) -> None:
        """Copies once the run on `stream` is done, and waits. Raises DeviceError if anything failed on the device."""

    def close(self) -> None:
        """Releases everything. No copy and no run may be in progress."""


class CudaMemory(HostMemory):
    """One engine's buffers, streams and events on one GPU: one stream for uploads, one for runs and downloads.

    on_close: called once everything is released.
    """

    device = "cuda"
    unified = False

    def __init__(self, cuda: Cuda, on_close: Callable[[], None] = lambda: None) -> None:
        """Raises DeviceError."""
        self.index = cuda.index
        self._cuda = cuda
        self._on_close = on_close
        self._buffers: dict[int, HostDeviceBuffer] = {}
        self._streams: list[Stream] = []
        self._events: list[Event] = []
        try:
            for _ in range(2):
                self._streams.append(cuda.stream())
        except DeviceError:
            self.close()
            raise
        self._compute, self._up = self._streams
        self.stream = int(self._compute)

    def buffer(self, size: int) -> HostDeviceBuffer:
        host = _pages(size)
        address = self._cuda.allocate(len(host))
        try:
            self._cuda.lock(host.ctypes.data, len(host))
        except DeviceError:
            self._cuda.free(address)
            raise
        buffer = self._buffers[address] = HostDeviceBuffer(host, address)
        return buffer

    def release(self, buffer: HostDeviceBuffer) -> None:
        if self._buffers.pop(buffer.address, None) is not None:
            self._cuda.unlock(buffer.host.ctypes.data)
            self._cuda.free(buffer.address)

    def events(self) -> CudaEvents:
        events = CudaEvents(self._cuda.event(), self._cuda.event())
        self._events += events
        return events

    def upload(self, copies: Sequence[Copy], events: CudaEvents) -> None:
        for buffer, size in copies:
            self._cuda.upload(buffer.address, buffer.host.ctypes.data, size, self._up)
        self._cuda.record(events.uploaded, self._up)

    def await_upload(self, events: CudaEvents) -> None:
        self._cuda.await_on(self._compute, events.uploaded)

    def download(self, copies: Sequence[Copy], events: CudaEvents) -> None:
        for buffer, size in copies:
            self._cuda.download(buffer.host.ctypes.data, buffer.address, size, self._compute)
        self._cuda.record(events.completed, self._compute)
        self._cuda.wait(events.completed)

    def close(self) -> None:
        # After some errors CUDA refuses every call: what can still be released is.
        for stream in self._streams:
            with contextlib.suppress(DeviceError):
                self._cuda.finish(stream)
        for buffer in list(self._buffers.values()):
            with contextlib.suppress(DeviceError):
                self.release(buffer)
        for event in self._events:
            with contextlib.suppress(DeviceError):
                self._cuda.destroy_event(event)
        for stream in self._streams:
            with contextlib.suppress(DeviceError):
                self._cuda.destroy_stream(stream)
        self._buffers, self._events, self._streams = {}, [], []
        on_close, self._on_close = self._on_close, lambda: None
        on_close()


def _pages(size: int) -> NDArray[np.uint8]:
    """Whole pages, because pages are what is locked. They take no memory before the first write."""
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)
