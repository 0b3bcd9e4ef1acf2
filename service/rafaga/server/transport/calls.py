"""`Call`, the one thing a transport hands to the services, and the routing, accounting and guarding around it.

    transport  →  Router.dispatch(call)  →  handler(call)  →  …  →  call.reply(bytes) | call.fail(error)

A handler must not block: on the native transport it runs on the thread that receives everybody's calls. It answers
later, from any thread. Of reply, fail and cancel the first one counts and the others do nothing.
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
from dataclasses import dataclass
from typing import Protocol

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
    to_status,
)
from rafaga.priority import PRIORITY_KEY, Priority
from rafaga.server.observability.metrics import MethodMetrics, Metrics
from rafaga.server.scheduling.job import JobTiming

_LOG = logging.getLogger(__name__)

Metadata = Sequence[tuple[str, str | bytes]]

# Runs a batch in the caller's thread; True when there is more. What it is given is called, perhaps twice and by any
# thread, once the run is taken for hung: the caller's thread may never come back, and does nothing more if it does.
Step = Callable[[Callable[[], None]], bool]

# There is no telling when the calls in flight end; this is about a few batches of a small model.
_RETRY_AFTER_S = 0.1


class Call(ABC):
    """One unary call. `deadline`: monotonic seconds, infinity when the caller set none. `priority`: what its metadata
    says, once the Router has looked.

    may_run: the thread that dispatches the call can be lent to a quick model. After dispatching, it calls `step`, where
    there is one, until that returns False: nobody else runs the call's job. See `Step`.
    """

    may_run = False

    def __init__(self, method: str, request: bytes, deadline: float = math.inf) -> None:
        self.method = method
        self.request = request
        self.deadline = deadline
        self.priority = Priority.NORMAL
        self.received = time.monotonic()
        self._unfinished = threading.Lock()  # taken by the first to finish the call: an atomic test-and-set
        # What it holds leads back to the call. Finishing lets go of it, so that requests are freed when they are
        # answered, and not when the garbage collector comes round.
        self._on_cancel: Callable[[], None] | None = None
        self._account: _Account | None = None
        self.step: Step | None = None
        self.served: tuple[str, JobTiming] | None = None  # by which model, once a model has answered

    @property
    @abstractmethod
    def metadata(self) -> Metadata: ...

    @property
    @abstractmethod
    def peer(self) -> str: ...

    @property
    def finished(self) -> bool:
        return self._unfinished.locked()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """`callback` runs when the caller cancels, hangs up or its deadline passes; at once if that has happened."""
        self._on_cancel = callback
        if self.finished:
            self._on_cancel = None
            callback()

    def reply(self, payload: bytes) -> None:
        if self._unfinished.acquire(blocking=False):
            try:
                self._send(payload)
            finally:  # a call that could not be answered must not be waited for
                self._settle(None)
                self._on_cancel = None

    def fail(self, error: RafagaError) -> None:
        if self._unfinished.acquire(blocking=False):
            try:
                self._send_failure(to_status(error))
            finally:
                self._settle(error)
                self._on_cancel = None

    def cancel(self) -> None:
        """For transports: the caller went away or its time ran out. There is nobody left to answer."""
        if self._unfinished.acquire(blocking=False):
            late = time.monotonic() >= self.deadline
            self._settle(DeadlineExceeded("the deadline passed") if late else Cancelled("the caller went away"))
            try:
                self._drop_work()
            finally:  # or a thread would be parked for ever
                self._let_go()

    def expire(self) -> None:
        """The time that the request itself allows has run out: the caller, who waits, is told, and its work dropped."""
        if self._unfinished.acquire(blocking=False):
            error = DeadlineExceeded("the time that the request allows has run out")
            try:
                self._send_failure(to_status(error))
            finally:
                self._settle(error)
                self._drop_work()

    def _drop_work(self) -> None:
        callback, self._on_cancel = self._on_cancel, None
        if callback is not None:
            callback()

    def _let_go(self) -> None:  # noqa: B027  only a transport that parks something overrides it
        """Releases what the transport holds for a call that nobody waits for any more."""

    def open_account(self, account: _Account) -> bool:
        """Counts the call as in flight. False when there is no room for it."""
        self._account = account
        return account.opened(self)

    def _settle(self, error: RafagaError | None) -> None:
        if self._account is not None:
            self._account.settled(self, error, time.monotonic() - self.received)

    @abstractmethod
    def _send(self, payload: bytes) -> None: ...

    @abstractmethod
    def _send_failure(self, status: Status) -> None: ...


Handler = Callable[[Call], None]
# A settled call, why it failed (None: it did not), and the seconds from receiving to settling it.
Trace = Callable[[Call, RafagaError | None, float], None]


class Transport(Protocol):
    """Owns sockets and nothing else."""

    @property
    def port(self) -> int:
        """The bound port, once started."""
        ...

    def start(self) -> None: ...

    def close(self, grace_s: float) -> None:
        """Takes no new calls, lets replies leave for `grace_s`, then closes every connection."""
        ...


def share(most: int) -> int:
    """Of a bound: what is kept for each priority alone."""
    return max(1, most // 4)


class _Held:
    """Calls, and the bytes of their requests."""

    __slots__ = ("bytes", "calls")

    def __init__(self) -> None:
        self.calls = 0
        self.bytes = 0


class InFlight:
    """How many calls, and bytes of requests, were received and are not answered yet.

    There is room for a call while fewer than `max_calls` are in flight, or fewer of its own priority than their
    `share`: others, however many, neither keep the urgent out nor starve those that are not. So there are `max_calls`
    of one priority, and at most two shares more of all. Bytes are counted by the same rule.
    """

    def __init__(self, max_calls: int = sys.maxsize, max_bytes: int = sys.maxsize) -> None:
        self._max_calls, self._share = max_calls, share(max_calls)
        self._max_bytes, self._bytes_share = max_bytes, share(max_bytes)
        self._all = _Held()
        self._of = {priority: _Held() for priority in Priority}
        self._lock = threading.Lock()  # taken as itself, because entering a Condition is two calls in Python
        self._changed = threading.Condition(self._lock)

    def enter(self, priority: Priority, size: int) -> bool:
        """Counts a call of `size` bytes. False when there is no room for it: then it is to leave soon."""
        held, own = self._all, self._of[priority]
        with self._lock:
            room = (held.calls < self._max_calls or own.calls < self._share) and (
                held.bytes + size <= self._max_bytes or own.bytes + size <= self._bytes_share
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
class _Account:
    """What is booked for the calls of one method."""

    metrics: MethodMetrics
    in_flight: InFlight
    trace: Trace | None

    def opened(self, call: Call) -> bool:
        return self.in_flight.enter(call.priority, len(call.request))

    def settled(self, call: Call, error: RafagaError | None, seconds: float) -> None:
        if error is None:
            self.metrics.answered(seconds)
        else:
            self.metrics.failed(error.code, error.reason, seconds)
        self.in_flight.leave(call.priority, len(call.request))
        if self.trace is not None:
            self.trace(call, error, seconds)


class Router:
    """Checks a call, finds its handler, books it, and turns every exception into a status.

    `in_flight` says for how many there is room; what comes beyond is refused. They are counted here, not in the
    transports, so that a refusal is typed, tells when to come back, and shows in the metrics. `trace` is told of every
    call that is settled.
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
        self._accounts = {method: _Account(metrics.method(method), self.in_flight, trace) for method in handlers}
        self._draining = False

    def drain(self) -> None:
        """Refuses every call from now on; those received before go on."""
        self._draining = True

    def book_refusal(self, method: str, error: RafagaError) -> None:
        """Counts a call that its transport refused before there was a `Call`."""
        if method in self._accounts:
            self._accounts[method].metrics.failed(error.code, error.reason, 0.0)

    def dispatch(self, call: Call) -> None:
        wrong: InvalidRequest | None = None
        try:
            call.priority = requested_priority(call.metadata)
        except InvalidRequest as error:
            wrong = error
        room = call.open_account(self._accounts[call.method])
        try:
            if self._draining:
                raise Draining("the server is stopping: send the request to another replica")
            if not room:
                raise QueueFull("too many calls, or bytes, are in flight: retry later", _RETRY_AFTER_S)
            if len(call.request) > self._max_request_bytes:
                raise RequestTooLarge(
                    f"expected a request of at most {self._max_request_bytes} bytes, got {len(call.request)}: split it"
                )
            if self._authenticator.required:
                self._authenticator.check(call.metadata)
            if wrong is not None:
                raise wrong
            self._handlers[call.method](call)
        except RafagaError as error:
            call.fail(error)
        except Exception:
            # The caller gets no detail: an exception's text may hold addresses, paths or other callers' data.
            _LOG.exception("a call failed on a defect", extra={"method": call.method})
            call.fail(InternalError("the server failed on this request; its log has the cause"))


def requested_priority(metadata: Metadata) -> Priority:
    """Raises InvalidRequest when it is none."""
    for key, value in metadata:
        if key == PRIORITY_KEY:
            try:
                return Priority.of(str(value))
            except ValueError as error:
                raise InvalidRequest(f"metadata {PRIORITY_KEY!r}: {error}") from None
    return Priority.NORMAL


class Authenticator:
    """Bearer tokens, known only by their sha256. With none configured everybody may call."""

    def __init__(self, token_sha256: Sequence[str]) -> None:
        self._hashes = tuple(bytes.fromhex(h) for h in token_sha256)

    @property
    def required(self) -> bool:
        return bool(self._hashes)

    def check(self, metadata: Metadata) -> None:
        """Raises Unauthenticated unless `metadata` carries "authorization: Bearer <token>" with a known token."""
        if not self._hashes:
            return
        for key, value in metadata:
            if key == "authorization" and isinstance(value, str) and value.startswith("Bearer "):
                digest = hashlib.sha256(value.removeprefix("Bearer ").encode()).digest()
                # In constant time, so that timing tells nothing about how much of a hash was right.
                if any(hmac.compare_digest(digest, known) for known in self._hashes):
                    return
        raise Unauthenticated("expected metadata 'authorization: Bearer <token>' with a token that the server knows")
