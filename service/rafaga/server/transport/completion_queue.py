"""One thread drives grpcio's completion queue: no pool between a call and its handler, no thread parked per call.

    request_call  →  admit  →  receive message  →  dispatch  →  …  →  send metadata, message, status

grpcio's own server hands each call to a pool thread, which waits for the message, for the engine and for the reply to
be written: about five wake-ups per call. Its parts under `grpc._cython.cygrpc` can be driven directly. TLS, message
limits, keepalive, flow control and header limits live in the C core below them and hold as before.

The thread takes a burst of events, then runs one batch of each quick model that got requests, then takes the next
burst. Replies are started by whichever thread has them. Events of methods that are registered with the grpc.Server
(health, reflection, streams) go to grpcio's own code and its thread pool.

Everything that grpcio keeps private and the server uses is in this file. `unsupported` checks it at start.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import grpc
from grpc import _server
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # the stubs leave it out

from rafaga.errors import InvalidRequest, QueueFull, Status
from rafaga.server.transport.router import Call, InlineRun, Metadata, Router

_LOG = logging.getLogger(__name__)

# Calls that the core may hand over before the thread asks for more. Others wait in the core.
_REQUESTED_CALLS = 64
# Events of one burst, before quick models run.
_BURST = 256
# The burst is over after so many polls in a row that find nothing: one poll looks at one connection.
_EMPTY_POLLS = 3
# A deadline beyond this is none: the core shows "no deadline" as a time in the far future.
_NO_DEADLINE_S = 1e9

# At the end of the server only: nothing signals that a call has ended.
_FLUSH_POLL_S = 0.01

_REQUEST = "rafaga_request_call"
_TIMEOUT = cygrpc.CompletionType.queue_timeout
_OK = cygrpc.StatusCode.ok


def unsupported() -> str | None:
    """Why this version of grpcio cannot be driven by `CompletionQueueLoop`; None when it looks as expected."""
    try:
        server = grpc.server(cast("Any", None))
        state = server._state  # type: ignore[attr-defined]
        for name in ("lock", "completion_queue", "server", "stage", "due", "rpc_states", "registered_method_handlers"):
            getattr(state, name)
        for name in ("start", "request_call", "request_registered_call", "register_method", "shutdown"):
            getattr(state.server, name)
        for name in ("_process_event_and_continue", "_request_registered_call", "_stop_serving"):
            getattr(_server, name)
        getattr(_server._ServerStage, "STARTED")  # noqa: B009  private: mypy does not know it
        getattr(state.completion_queue, "poll")  # noqa: B009
        getattr(cygrpc.Call, "start_server_batch")  # noqa: B009
        cygrpc.ReceiveMessageOperation(0)
        _final_operations((cygrpc.SendMessageOperation(b"", 0),), (("key", "value"),), _OK, b"", with_close=True)
    except Exception as error:  # whatever a changed private interface raises
        return f"{type(error).__name__}: {error}"
    return None


class CompletionQueueLoop:
    """Serves `server`: the methods of `router` itself, registered methods through grpcio.

    max_receiving: calls whose requests are on their way at a time. Beyond it the oldest is refused: uploads that never
    end keep no others out, and what they have sent so far is freed. on_death: called when no thread polls the queue any
    more and none can be started.
    """

    def __init__(self, server: grpc.Server, router: Router, max_receiving: int, on_death: Callable[[], None]) -> None:
        self._state: Any = server._state  # type: ignore[attr-defined]
        self._router = router
        self._max_receiving = max_receiving
        self._on_death = on_death
        self._methods: Mapping[bytes, str] = {method.encode(): method for method in router.methods}
        self._open: set[_LoopCall] = set()
        self._receiving: dict[_LoopCall, None] = {}  # in the order of arrival
        self._requested = 0
        self._taking_over = threading.Lock()

    def start(self) -> None:
        """What grpc.Server.start does, with this loop in the place of its own. Raises RuntimeError without a thread."""
        state = self._state
        with state.lock:
            state.server.start()
            state.stage = _server._ServerStage.STARTED
            for method in state.registered_method_handlers:
                _server._request_registered_call(state, method)
            # As long as this is in `due`, grpcio's stop() waits for the calls of this loop too.
            state.due.add(_REQUEST)
            for _ in range(_REQUESTED_CALLS):
                self._request()
        self._begin(_Turn())

    def flush(self, timeout_s: float) -> None:
        """Waits until the calls that are open now have ended: their replies have been written to the sockets."""
        end, open_now = time.monotonic() + timeout_s, set(self._open)
        while open_now & self._open and time.monotonic() < end:
            time.sleep(_FLUSH_POLL_S)

    def _request(self) -> None:
        try:
            self._state.server.request_call(self._state.completion_queue, self._state.completion_queue, _REQUEST)
        except (ValueError, cygrpc.UsageError):
            return  # shutdown has begun
        self._requested += 1

    def _begin(self, turn: _Turn) -> None:
        threading.Thread(target=self._run, args=(turn,), name="transport", daemon=True).start()

    def _take_over(self, turn: _Turn) -> None:
        """The polling thread hangs in a model's run: another thread takes its place and what it had left to do."""
        with self._taking_over:
            if turn.over:
                return
            turn.over = True
            try:
                self._begin(_Turn(turn.models, turn.fresh))
            except RuntimeError:
                _LOG.critical("no thread polls for calls and none can be started: restart required", exc_info=True)
                self._on_death()

    def _run(self, turn: _Turn) -> None:
        while self._take_burst(turn) and self._run_models(turn):
            fresh, turn.fresh = turn.fresh, []
            for call in fresh:
                call.watch()

    def _take_burst(self, turn: _Turn) -> bool:
        """Waits for an event, unless there are models to run, and takes all that are there. False: the server has
        stopped."""
        poll = self._state.completion_queue.poll
        wait = 0 if turn.models else None
        empty = 0
        for _ in range(_BURST):
            event = poll(wait)
            if event.completion_type != _TIMEOUT:
                if not self._process(event, turn):
                    return False
                empty = 0
            elif (empty := empty + 1) == _EMPTY_POLLS:
                break
            # Dropped before the next poll: an event of a call that ended keeps it, and the server, alive.
            event = None
            wait = 0
        return True

    def _run_models(self, turn: _Turn) -> bool:
        """One batch of each quick model. False: a run hung, and another thread has taken over."""
        for run in list(turn.models):
            try:
                more = run(lambda: self._take_over(turn))
            except Exception:  # this thread serves all callers
                _LOG.exception("unhandled exception in a model's inline run")
                more = False
            if turn.over:
                return False
            if not more:
                turn.models.discard(run)
        return True

    def _process(self, event: Any, turn: _Turn) -> bool:
        """False once the server has stopped."""
        tag = event.tag
        try:
            if tag is _REQUEST:
                self._requested -= 1
                if event.success:
                    self._request()
                    self._arrived(event, turn)
            elif type(tag) is tuple:
                call, kind = tag
                self._completed(call, kind, event)
            else:
                return bool(_server._process_event_and_continue(self._state, event))
        except Exception:  # this thread serves all callers: one call's failure must not end it
            _LOG.exception("unhandled exception in the transport")
        return bool(self._requested or self._open) or not self._stopped()

    def _stopped(self) -> bool:
        with self._state.lock:
            self._state.due.discard(_REQUEST)
            return bool(_server._stop_serving(self._state))

    def _arrived(self, event: Any, turn: _Turn) -> None:
        name = event.call_details.method
        method = self._methods.get(name) or name.decode(errors="replace")
        remaining = event.call_details.deadline - time.time()
        deadline = math.inf if remaining > _NO_DEADLINE_S else time.monotonic() + remaining
        call = _LoopCall(self, turn, event, method, deadline)
        self._open.add(call)
        if self._router.admit(call):
            call.receive()
            turn.fresh.append(call)
            self._receiving[call] = None
            if len(self._receiving) > self._max_receiving:
                slowest = next(iter(self._receiving))
                slowest.fail(QueueFull("too many requests are being received, and this was the slowest: retry later"))
                del self._receiving[slowest]

    def _completed(self, call: _LoopCall, kind: int, event: Any) -> None:
        if kind == _FINAL:
            self._open.discard(call)
            return
        if kind == _CLOSE:
            call.cancel()  # also completes after a reply; then there is nothing left to cancel
            return
        message: bytes | None = event.batch_operations[0].message()
        self._receiving.pop(call, None)
        if message is None:  # half-closed without one; or cut off by the core, which then has answered already
            call.fail(InvalidRequest("expected one request message, got none"))
        elif not call.finished:
            call.request = message
            self._router.dispatch(call)

    def forget(self, call: _LoopCall) -> None:
        self._open.discard(call)


class _Turn:
    """The time of one thread as the polling one.

    models: runs of quick ones that may have batches. fresh: calls whose cancellation is not listened for yet. over:
    another thread has taken over.
    """

    def __init__(self, models: Iterable[InlineRun] = (), fresh: Iterable[_LoopCall] = ()) -> None:
        self.models = set(models)
        self.fresh = list(fresh)
        self.over = False


# A batch of operations is marked with its call and one of these.
_MESSAGE, _CLOSE, _FINAL = range(3)


class _LoopCall(Call):
    """Batches of operations: receive the message; receive the close; send the final ones.

    A call that is answered within the burst that brought it receives its close in the final batch: one completion
    instead of two. Whether it does is decided by the first to take `_unwatched`: the reply, or the end of the burst.
    """

    def __init__(self, loop: CompletionQueueLoop, turn: _Turn, event: Any, method: str, deadline: float) -> None:
        super().__init__(method, event.invocation_metadata, deadline=deadline)
        self.inline = turn.models.add
        self._loop = loop
        self._call = event.call
        self._unwatched = threading.Lock()

    def receive(self) -> None:
        self._call.start_server_batch((cygrpc.ReceiveMessageOperation(0),), (self, _MESSAGE))

    def watch(self) -> None:
        """Listens for the caller's cancellation, unless the call was answered already."""
        if self._unwatched.acquire(blocking=False):
            self._call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(0),), (self, _CLOSE))

    def _send(self, payload: bytes) -> None:
        self._finish((cygrpc.SendMessageOperation(payload, 0),), None, _OK, b"")

    def _send_failure(self, status: Status) -> None:
        self._finish((), status.trailing_metadata, status.code.value[0], status.message.encode())

    def _finish(self, message: tuple[Any, ...], trailing: Metadata | None, code: int, details: bytes) -> None:
        with_close = self._unwatched.acquire(blocking=False)
        operations = _final_operations(message, trailing, code, details, with_close=with_close)
        self._call.start_server_batch(operations, (self, _FINAL))

    def _release(self) -> None:
        self._loop.forget(self)


def _final_operations(
    message: tuple[Any, ...], trailing: Metadata | None, code: int, details: bytes, *, with_close: bool
) -> list[Any]:
    """`message`: the operation that sends the reply; () for a failure."""
    operations = [
        cygrpc.SendInitialMetadataOperation(None, 0),
        *message,
        cygrpc.SendStatusFromServerOperation(trailing, code, details, 0),
    ]
    if with_close:
        operations.append(cygrpc.ReceiveCloseOnServerOperation(0))
    return operations
