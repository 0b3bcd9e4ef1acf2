"""One daemon thread that makes calls in order."""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future

from rafaga.server.scheduling.job import Arrays


class SerialExecutor:
    """Unlike a ThreadPoolExecutor's, its thread does not keep the process alive: a run on a device may never end."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Arrays], Future[Arrays]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Arrays]) -> Future[Arrays]:
        future: Future[Arrays] = Future()
        self._calls.put((call, future))
        return future

    def close(self, timeout_s: float) -> bool:
        """Ends after the calls already submitted. False: they take longer than `timeout_s`."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (work := self._calls.get()) is not None:
            _complete(*work)
            del work  # what it holds must not wait for the next


def _complete(call: Callable[[], Arrays], future: Future[Arrays]) -> None:
    try:
        outputs = call()
    except BaseException as error:
        # The frames of the failed calls hold the session, which must not outlive its stream.
        traceback.clear_frames(error.__traceback__)
        future.set_exception(error)
        del future  # the error's traceback holds this frame: a reference cycle
    else:
        future.set_result(outputs)
