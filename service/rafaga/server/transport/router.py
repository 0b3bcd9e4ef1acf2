"""`Call`, one unary call on its way through the server, and the `Router`, which admits calls, finds their handlers and
books them.

    transport  →  Router.admit, Router.dispatch  →  handler(call)  →  …  →  call.reply(bytes) | call.fail(error)

A handler must not block: it runs on the thread that receives all calls. It answers later, from any thread. Of reply,
fail, cancel and expire, the first wins and the others do nothing: a call is answered exactly once.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from rafaga.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    InternalError,
    InvalidRequest,
    QueueFull,
    RafagaError,
    RequestTooLarge,
    Status,
    Unauthenticated,
    Unsupported,
    quoted,
    to_status,
)
from rafaga.priority import PRIORITY_KEY, Priority
from rafaga.server.observability.metrics import MAX_RECORDS, OK, CallRecord, Metrics
from rafaga.server.scheduling.job import JobTiming

_LOG = logging.getLogger(__name__)

# When calls in flight will end is unknown; this is about a few batches of a small model.
_RETRY_AFTER_S = 0.1

Metadata = Sequence[tuple[str, str | bytes]]

InlineRun = Callable[[Callable[[], None]], bool]
"""Runs one batch of a model that is so quick that the thread which received its requests may run it. True: there is
more to run, call again.

Its argument is called, by any thread and perhaps twice, when the run is given up as hung. The caller's thread may then
never return; if it does, it must not touch anything that it shared.
"""


class Call(ABC):
    """One unary call.

    deadline: monotonic seconds, infinity when the caller set none. priority: from the metadata, set by the Router.
    inline: has a quick model run soon, in the thread that dispatches the call: no other thread was woken for its queue.
    None where that thread cannot be lent. router: where it is booked.
    in_flight: counted as such by the Router. served: model name and timing of the answer.
    """

    inline: Callable[[InlineRun], object] | None = None

    def __init__(self, method: str, metadata: Metadata, request: bytes = b"", deadline: float = math.inf) -> None:
        self.method = method
        self.metadata = metadata
        self.request = request
        self.deadline = deadline
        self.priority = Priority.NORMAL
        self.received = time.monotonic()
        self.in_flight = False
        self.router: Router | None = None
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
        if self.router is not None:
            self.router.settled(self, error, time.monotonic() - self.received)
        return drop_work or _nothing

    @abstractmethod
    def _send(self, payload: bytes) -> None: ...

    @abstractmethod
    def _send_failure(self, status: Status) -> None: ...

    def _release(self) -> None:  # noqa: B027  only a transport that blocks a thread per call overrides it
        """Frees what the transport holds for a call that was cancelled."""


Handler = Callable[[Call], None]

# A settled call, the error it failed with (None: it was answered), and the seconds from receiving to settling it.
Trace = Callable[[Call, RafagaError | None, float], None]


def _nothing() -> None:
    pass


def reserved(limit: int) -> int:
    """The part of a limit that is kept for each priority alone."""
    return max(1, limit // 4)


class _Held:
    """Calls, and the bytes of their requests."""

    __slots__ = ("bytes", "calls")

    def __init__(self) -> None:
        self.calls = 0
        self.bytes = 0


class InFlight:
    """Counts calls, and bytes of requests, that were received and are not answered yet.

    A call has room while fewer than `max_calls` are in flight, or fewer of its own priority than `reserved`: calls of
    one priority can neither keep urgent ones out nor starve the others. So there are at most `max_calls` of one
    priority, and `2 * reserved(max_calls)` more of all. Bytes are bounded by the same rule.
    """

    def __init__(self, max_calls: int = sys.maxsize, max_bytes: int = sys.maxsize) -> None:
        self._max_calls, self._reserved_calls = max_calls, reserved(max_calls)
        self._max_bytes, self._reserved_bytes = max_bytes, reserved(max_bytes)
        self._all = _Held()
        self._of = {priority: _Held() for priority in Priority}
        self._lock = threading.Lock()

    def has_room(self, priority: Priority) -> bool:
        """Whether a call would be within the limits now, whatever its size."""
        return self._all.calls < self._max_calls or self._of[priority].calls < self._reserved_calls

    def enter(self, priority: Priority, size: int) -> bool:
        """Counts a call of `size` bytes. False: over the limit; the caller must still call leave()."""
        held, own = self._all, self._of[priority]
        with self._lock:
            room = self.has_room(priority) and (
                held.bytes + size <= self._max_bytes or own.bytes + size <= self._reserved_bytes
            )
            held.calls += 1
            held.bytes += size
            own.calls += 1
            own.bytes += size
            return room

    def leave(self, priority: Priority, size: int) -> None:
        held, own = self._all, self._of[priority]
        with self._lock:
            own.calls -= 1
            own.bytes -= size
            held.bytes -= size
            held.calls -= 1

    @property
    def count(self) -> int:
        return self._all.calls


class Router:
    """`in_flight` bounds the calls that are received and unanswered; calls over it are refused.

    They are counted here, so that a refusal is typed, says when to retry, and shows in the metrics. `trace` is given
    every call that is settled.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        authenticator: Authenticator,
        metrics: Metrics,
        max_request_bytes: int,
        in_flight: InFlight | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.methods = tuple(handlers)
        self.in_flight = in_flight or InFlight()
        self._handlers = handlers
        self._authenticator = authenticator
        self._max_request_bytes = max_request_bytes
        self._metrics = metrics
        self._trace = trace
        self._draining = False
        for method in handlers:
            metrics.method(method)

    def drain(self) -> None:
        """Refuses every call from now on; those admitted before go on."""
        self._draining = True

    def handle(self, call: Call) -> None:
        """Admits and dispatches a call whose request is there already."""
        if self.admit(call):
            self.dispatch(call)

    def admit(self, call: Call) -> bool:
        """Refuses a call where its metadata alone says so, before its request is received.

        False: it was answered with an error. A call counts as in flight only once its request is there: callers that
        never finish sending theirs keep no others out.
        """
        call.router = self if call.method in self._handlers else None
        error = self._refusal(call)
        if error is not None:
            call.fail(error)
        return error is None

    def dispatch(self, call: Call) -> None:
        """Hands an admitted call with its request to its handler."""
        try:
            size, call.in_flight = len(call.request), True
            if not self.in_flight.enter(call.priority, size):
                raise QueueFull("too many calls, or bytes of requests, are in flight: retry later", _RETRY_AFTER_S)
            if size > self._max_request_bytes:
                raise RequestTooLarge(
                    f"expected a request of at most {self._max_request_bytes} bytes, got {size}: split it"
                )
            self._handlers[call.method](call)
        except Exception as error:
            call.fail_with(error)

    def settled(self, call: Call, error: RafagaError | None, seconds: float) -> None:
        calls = self._metrics.calls
        code, reason = (OK, "") if error is None else (error.code.name, error.reason)
        calls.append(CallRecord(call.method, seconds, code, reason))
        if len(calls) >= MAX_RECORDS:
            self._metrics.fold()
        if call.in_flight:
            self.in_flight.leave(call.priority, len(call.request))
        if self._trace is not None:
            self._trace(call, error, seconds)

    def _refusal(self, call: Call) -> RafagaError | None:
        wrong: InvalidRequest | None = None
        try:
            call.priority = requested_priority(call.metadata)
        except InvalidRequest as error:
            wrong = error  # a missing token is reported first
        if self._draining:
            return Draining("the server is stopping: send the request to another replica")
        if not self.in_flight.has_room(call.priority):
            return QueueFull("too many calls are in flight: retry later", _RETRY_AFTER_S)
        if (unauthenticated := self._authenticator.refusal(call.metadata)) is not None:
            return unauthenticated
        if call.router is None:
            return Unsupported(f"this server has no method {quoted(call.method)}")
        return wrong


def requested_priority(metadata: Metadata) -> Priority:
    """Raises InvalidRequest when the metadata names an unknown priority."""
    for key, value in metadata:
        if key == PRIORITY_KEY:
            try:
                return Priority.of(str(value))
            except ValueError as error:
                raise InvalidRequest(f"metadata {PRIORITY_KEY!r}: {error}") from None
    return Priority.NORMAL


class Authenticator:
    """Bearer tokens, of which the server knows only the sha256. With none configured, every caller is accepted."""

    def __init__(self, token_sha256: Sequence[str]) -> None:
        self._hashes = tuple(bytes.fromhex(h) for h in token_sha256)

    @property
    def required(self) -> bool:
        return bool(self._hashes)

    def refusal(self, metadata: Metadata) -> Unauthenticated | None:
        """None where `metadata` carries "authorization: Bearer <token>" with a known token, or none is required."""
        if not self._hashes:
            return None
        for key, value in metadata:
            scheme, _, token = str(value).partition(" ")
            if key == "authorization" and scheme.lower() == "bearer":  # the scheme has no case: RFC 9110, 11.1
                digest = hashlib.sha256(token.encode()).digest()
                # In constant time: the time of a comparison must not show how much of a hash matched.
                if any(hmac.compare_digest(digest, known) for known in self._hashes):
                    return None
        return Unauthenticated("expected metadata 'authorization: Bearer <token>' with a token that the server knows")
