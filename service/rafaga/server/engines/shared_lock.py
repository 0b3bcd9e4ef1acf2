"""Many flights at once, or one capture alone: while a CUDA graph is captured, nobody else may allocate or wait.

ONNX Runtime captures in CUDA's global mode, which forbids every thread of the process what could disturb the capture:
allocating, freeing, and asking for events. Whoever did so nonetheless would fail, and so would the capture.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rafaga.errors import DeviceError


class Gate:
    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside = 0
        self._closed = False

    def enter(self) -> None:
        """Waits while somebody is alone, or wants to be."""
        with self._changed:
            while self._closed:
                self._changed.wait()
            self._inside += 1

    def leave(self) -> None:
        """From any thread."""
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    @contextmanager
    def shared(self) -> Iterator[None]:
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def alone(self, timeout_s: float = 10.0) -> Iterator[None]:
        """Lets nobody in, and waits until all have left. Raises DeviceError when somebody does not."""
        end = time.monotonic() + timeout_s
        with self._changed:
            if not self._changed.wait_for(lambda: not self._closed, timeout_s):
                raise DeviceError("another model's CUDA graph is being captured, and does not end")
            self._closed = True
            left = self._changed.wait_for(lambda: not self._inside, max(0.0, end - time.monotonic()))
            if not left:
                self._closed = False
                self._changed.notify_all()
                raise DeviceError("a run of another model does not end, and no CUDA graph is captured beside it")
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()
