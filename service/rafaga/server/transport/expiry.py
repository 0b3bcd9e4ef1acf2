"""Ends calls at the timeouts that stand inside their requests, at any stage. grpcio does not know these."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import weakref

from rafaga.server.transport.router import Call

_LOG = logging.getLogger(__name__)

# A request may allow centuries; locks do not take such times.
_MAX_WAIT_S = 3600.0
# Most calls end before their timeout. Their entries are removed at the timeout, or when there are this many.
_MIN_TIDY = 1024


class Expiry:
    """One thread, which starts with the first deadline and sleeps until the next."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, weakref.ref[Call]]] = []  # a heap
        self._numbers = itertools.count()
        self._tidy_at = _MIN_TIDY
        self._changed = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._due)

    def watch(self, call: Call, at: float) -> None:
        """`call` expires at `at`, in monotonic seconds, unless it has finished by then."""
        with self._changed:
            heapq.heappush(self._due, (at, next(self._numbers), weakref.ref(call)))
            if len(self._due) > self._tidy_at:
                self._due = [entry for entry in self._due if not _over(entry[2])]
                heapq.heapify(self._due)
                self._tidy_at = max(_MIN_TIDY, 2 * len(self._due))
            if self._thread is None and not self._closed:
                thread = threading.Thread(target=self._expire, name="expiry", daemon=True)
                thread.start()  # without a thread, the next call tries again
                self._thread = thread
            elif self._due and self._due[0][0] == at:  # removed already if the call has ended
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _expire(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (wait_s := self._wait_s()) != 0.0:
                    self._changed.wait(wait_s)
                if self._closed:
                    return
                call = heapq.heappop(self._due)[2]()
            if call is not None:
                try:
                    call.expire()
                except Exception:  # this thread serves all calls
                    _LOG.exception("a call could not be expired")

    def _wait_s(self) -> float | None:
        """Seconds until the next is due; None when there is none."""
        return min(max(0.0, self._due[0][0] - time.monotonic()), _MAX_WAIT_S) if self._due else None


def _over(reference: weakref.ref[Call]) -> bool:
    call = reference()
    return call is None or call.finished
