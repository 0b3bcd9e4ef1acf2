"""The memory that batches travel through: page-locked on the host, its twin on the GPU, and the copies between them.

    host (assembled here)  --upload-->  device  --run-->  device  --download-->  host (answered from here)

On the CPU the twins are the same memory and the copies nothing, so that the engine above is the same for both.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rafaga.errors import DeviceError
from rafaga.server.engines.cuda import Cuda, Event, Stream


class Twin(NamedTuple):
    """Bytes of the host, and the address of as many on the device."""

    host: NDArray[np.uint8]
    address: int

    def view(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """The first bytes of the host's as an array."""
        size = dtype.itemsize
        for length in shape:
            size *= length
        return self.host[:size].view(dtype).reshape(shape)


class Copy(NamedTuple):
    """The first `size` bytes of a twin."""

    twin: Twin
    size: int


class Ticket(NamedTuple):
    """The moments in the life of one batch that others wait for."""

    uploaded: Event
    computed: Event
    downloaded: Event


class Memory(Protocol):
    """`device`, `index`: ONNX Runtime's words for where the twins lie. stream: what sessions must run on; 0: any.

    unified: the device reads and writes the host's own memory.
    """

    device: str
    index: int
    stream: int
    unified: bool

    def twin(self, size: int) -> Twin: ...

    def release(self, twin: Twin) -> None: ...

    def ticket(self) -> Ticket: ...

    def upload(self, copies: Sequence[Copy], ticket: Ticket) -> None:
        """Begins the copies."""

    def arrive(self, ticket: Ticket) -> None:
        """What is run next on `stream` waits for the uploads."""

    def download(self, copies: Sequence[Copy], ticket: Ticket) -> None:
        """Begins the copies once what `stream` was given so far is done."""

    def wait(self, ticket: Ticket) -> None:
        """Until the downloads are done. Raises DeviceError for whatever went wrong on the device since."""

    def close(self) -> None:
        """Gives everything back. Nothing may be on its way any more."""


class HostMemory:
    device = "cpu"
    index = 0
    stream = 0
    unified = True
    _TICKET = Ticket(Event(0), Event(0), Event(0))

    def twin(self, size: int) -> Twin:
        host = _pages(size)
        return Twin(host, host.ctypes.data)

    def release(self, twin: Twin) -> None:
        """Nothing: the array's last reader ends it."""

    def ticket(self) -> Ticket:
        return self._TICKET

    def upload(self, copies: Sequence[Copy], ticket: Ticket) -> None:
        """Nothing: it is there already."""

    def arrive(self, ticket: Ticket) -> None:
        """Nothing, as above."""

    def download(self, copies: Sequence[Copy], ticket: Ticket) -> None:
        """Nothing, as above."""

    def wait(self, ticket: Ticket) -> None:
        """Nothing: a run on the CPU returns when it is done."""

    def close(self) -> None:
        """Nothing to give back."""


class CudaMemory:
    """Three streams: while one batch runs, the next one's rows go up and the last one's answers come down."""

    device = "cuda"
    unified = False

    def __init__(self, cuda: Cuda) -> None:
        self.index = cuda.index
        self._cuda = cuda
        self._streams: list[Stream] = []
        self._events: list[Event] = []
        self._twins: dict[int, Twin] = {}
        try:
            for _ in range(3):
                self._streams.append(cuda.stream())
        except DeviceError:
            self.close()
            raise
        self._compute, self._up, self._down = self._streams
        self.stream = int(self._compute)

    def twin(self, size: int) -> Twin:
        host = _pages(size)
        address = self._cuda.allocate(len(host))
        try:
            self._cuda.lock(host.ctypes.data, len(host))
        except DeviceError:
            self._cuda.free(address)
            raise
        twin = self._twins[address] = Twin(host, address)
        return twin

    def release(self, twin: Twin) -> None:
        if self._twins.pop(twin.address, None) is not None:
            self._cuda.unlock(twin.host.ctypes.data)
            self._cuda.free(twin.address)

    def ticket(self) -> Ticket:
        ticket = Ticket(self._cuda.event(), self._cuda.event(), self._cuda.event())
        self._events += ticket
        return ticket

    def upload(self, copies: Sequence[Copy], ticket: Ticket) -> None:
        for twin, size in copies:
            self._cuda.upload(twin.address, twin.host.ctypes.data, size, self._up)
        self._cuda.record(ticket.uploaded, self._up)

    def arrive(self, ticket: Ticket) -> None:
        self._cuda.await_on(self._compute, ticket.uploaded)

    def download(self, copies: Sequence[Copy], ticket: Ticket) -> None:
        self._cuda.record(ticket.computed, self._compute)
        self._cuda.await_on(self._down, ticket.computed)
        for twin, size in copies:
            self._cuda.download(twin.host.ctypes.data, twin.address, size, self._down)
        self._cuda.record(ticket.downloaded, self._down)

    def wait(self, ticket: Ticket) -> None:
        self._cuda.wait(ticket.downloaded)

    def close(self) -> None:
        # A device that failed refuses everything from then on: what can be given back still is.
        for stream in self._streams:
            with contextlib.suppress(DeviceError):
                self._cuda.finish(stream)
        for twin in list(self._twins.values()):
            with contextlib.suppress(DeviceError):
                self.release(twin)
        for event in self._events:
            with contextlib.suppress(DeviceError):
                self._cuda.destroy_event(event)
        for stream in self._streams:
            with contextlib.suppress(DeviceError):
                self._cuda.destroy_stream(stream)
        self._twins, self._events, self._streams = {}, [], []


def _pages(size: int) -> NDArray[np.uint8]:
    """Whole pages of their own, because pages are what is locked. They take no memory before they are written to."""
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)
