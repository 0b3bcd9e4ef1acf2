"""`Call`: one unary call on its way through the server. It is answered exactly once.

    transport  →  Router.admit, Router.dispatch  →  handler(call)  →  …  →  call.reply(bytes) | call.fail(error)

A handler must not block: it runs on the thread that receives all calls. It answers later, from any thread. Of reply,
fail, cancel and expire, the first wins and the others do nothing.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from rafaga.errors import Cancelled, DeadlineExceeded, InternalError, RafagaError, Status, to_status
from rafaga.priority import Priority
from rafaga.server.scheduling.job import JobTiming

_LOG = logging.getLogger(__name__)

Metadata = Sequence[tuple[str, str | bytes]]


class InlineModel(Protocol):
    """A model so quick that the thread which received its requests may run it."""

    def run_inline(self, on_hung: Callable[[], None]) -> bool:
        """Runs one batch. True: there is more to run, call again.

        `on_hung` is called, by any thread and perhaps twice, when the run is given up as hung. The caller's thread may
        then never return; if it does, it must not touch anything that it shared.
        """
        ...


class InlineRunner(Protocol):
    def add(self, model: InlineModel) -> None:
        """Runs `model` soon, in the thread that dispatches the call. No other thread was woken for its queue."""
        ...


class Account(Protocol):
    """Where a call is booked while it is in flight."""

    def settled(self, call: Call, error: RafagaError | None, seconds: float) -> None: ...


class Call(ABC):
    """One unary call.

    deadline: monotonic seconds, infinity when the caller set none. priority: from the metadata, set by the Router.
    inline: runs quick models in the thread that dispatches the call; None where that thread cannot be lent.
    in_flight: counted as such by the Router. served: model name and timing of the answer.
    """

    inline: InlineRunner | None = None

    def __init__(self, method: str, metadata: Metadata, request: bytes = b"", deadline: float = math.inf) -> None:
        self.method = method
        self.metadata = metadata
        self.request = request
        self.deadline = deadline
        self.priority = Priority.NORMAL
        self.received = time.monotonic()
        self.in_flight = False
        self.account: Account | None = None
        self.served: tuple[str, JobTiming] | None = None
        self._unfinished = threading.Lock()  # acquired by the first to finish the call: an atomic test-and-set
        # What it refers to leads back to the call. Finishing drops it, so that a request is freed when it is answered
        # and not when the garbage collector runs.
        self._on_cancel: Callable[[], None] | None = None

    @property
    def finished(self) -> bool:
        return self._unfinished.locked()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """`callback` runs when the caller cancels or hangs up or the deadline passes; at once if that has happened."""
        self._on_cancel = callback
        if self.finished:
            self._on_cancel = None
            callback()

    def reply(self, payload: bytes) -> None:
        if self._unfinished.acquire(blocking=False):
            # Booked first: a caller that has its answer finds it in the metrics.
            self._settle(None)
            self._send(payload)

    def fail(self, error: RafagaError) -> None:
        if self._unfinished.acquire(blocking=False):
            self._settle(error)
            self._send_failure(to_status(error))

    def fail_with(self, error: Exception) -> None:
        """`error`: whatever handling the call has raised. Of a defect the caller gets no detail: an exception's text
        may hold addresses, paths or other callers' data."""
        if not isinstance(error, RafagaError):
            _LOG.error("unhandled exception in handler", exc_info=error, extra={"method": self.method})
            error = InternalError("the server failed on this request; its log has the cause")
        self.fail(error)

    def cancel(self) -> None:
        """For transports: the caller hung up or its deadline passed. No answer is sent."""
        if self._unfinished.acquire(blocking=False):
            late = time.monotonic() >= self.deadline
            drop_work = self._settle(
                DeadlineExceeded("the deadline passed") if late else Cancelled("the caller went away")
            )
            try:
                drop_work()
            finally:  # or a blocked thread would wait forever
                self._release()

    def expire(self) -> None:
        """The timeout inside the request has passed: answers DEADLINE_EXCEEDED and drops the work."""
        if self._unfinished.acquire(blocking=False):
            error = DeadlineExceeded("the request's own timeout has passed")
            drop_work = self._settle(error)
            try:
                self._send_failure(to_status(error))
            finally:
                drop_work()

    def _settle(self, error: RafagaError | None) -> Callable[[], None]:
        """Books the end of the call; gives what `on_cancel` was given, which the call refers to no longer."""
        drop_work, self._on_cancel = self._on_cancel, None
        if self.account is not None:
            self.account.settled(self, error, time.monotonic() - self.received)
        return drop_work or _nothing

    @abstractmethod
    def _send(self, payload: bytes) -> None: ...

    @abstractmethod
    def _send_failure(self, status: Status) -> None: ...

    def _release(self) -> None:  # noqa: B027  only a transport that blocks a thread per call overrides it
        """Frees what the transport holds for a call that was cancelled."""


Handler = Callable[[Call], None]


def _nothing() -> None:
    pass
