"""The Router: admits calls, finds their handlers, books them, and turns every exception into a status."""

from __future__ import annotations

import hashlib
import hmac
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rafaga.errors import (
    Draining,
    InvalidRequest,
    QueueFull,
    RafagaError,
    RequestTooLarge,
    Unauthenticated,
    Unsupported,
    quoted,
)
from rafaga.priority import PRIORITY_KEY, Priority
from rafaga.server.observability.metrics import MethodMetrics, Metrics
from rafaga.server.transport.call import Call, Handler, Metadata

# When calls in flight will end is unknown; this is about a few batches of a small model.
_RETRY_AFTER_S = 0.1

# A settled call, the error it failed with (None: it was answered), and the seconds from receiving to settling it.
Trace = Callable[[Call, RafagaError | None, float], None]


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
        self._lock = threading.Lock()  # used directly: entering a Condition costs two Python calls more
        self._changed = threading.Condition(self._lock)

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
            if not held.calls:
                self._changed.notify_all()

    @property
    def count(self) -> int:
        return self._all.calls

    def wait_until_none(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._all.calls, timeout_s)


@dataclass(frozen=True)
class _MethodAccount:
    """Books the calls of one method."""

    metrics: MethodMetrics
    in_flight: InFlight
    trace: Trace | None

    def settled(self, call: Call, error: RafagaError | None, seconds: float) -> None:
        if error is None:
            self.metrics.answered(seconds)
        else:
            self.metrics.failed(error.code, error.reason, seconds)
        if call.in_flight:
            self.in_flight.leave(call.priority, len(call.request))
        if self.trace is not None:
            self.trace(call, error, seconds)


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
        self._accounts = {method: _MethodAccount(metrics.method(method), self.in_flight, trace) for method in handlers}
        self._draining = False

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
        call.account = self._accounts.get(call.method)
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
        if call.account is None:
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
