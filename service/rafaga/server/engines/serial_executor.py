"""One daemon thread that makes calls in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class SerialExecutor:
    """Unlike a ThreadPoolExecutor's, its thread does not keep the process alive: a run on a device may never end."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        """`call` must not raise."""
        self._calls.put(call)

    def close(self, timeout_s: float) -> bool:
        """Ends after the calls already posted. False: they take longer than `timeout_s`."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # what it holds must not wait for the next
