"""The opt-in transport for trusted clients: HTTP/2 and gRPC framing in Rust, outside the GIL (pygrpc-native).

Calls reach Python in batches. One thread drains them, and runs the quick models itself: waking the engine's thread
would take longer (`ServedModel.step`). When such a run hangs, another thread takes over. What the front does not bound
or serve itself is closed in Python or named in docs/transports.md: the Router checks size and admission on receipt, and
health and reflection are served by grpcio on a private Unix socket behind it.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import grpc
from pygrpc_native import EVENT_CALL, NativeGrpcFront

from rafaga.errors import PUSHBACK_KEY, Status
from rafaga.server.observability.metrics import Metrics
from rafaga.server.transport.calls import Authenticator, Call, Metadata, Router, Step
from rafaga.server.transport.grpc import PAUSE_BEFORE_CLOSE_S, GrpcioTransport, Limits

_LOG = logging.getLogger(__name__)

_MAX_EVENTS = 256
_IO_THREADS = 1
_BEHIND_CALLS = 64  # beside the spare threads


class NativeTransport:
    """`address` is "host:port". `on_death` is called when nobody receives any more, and nobody can."""

    def __init__(
        self,
        address: str,
        router: Router,
        authenticator: Authenticator,
        limits: Limits,
        services: Sequence[Callable[[grpc.Server], None]],
        metrics: Metrics,
        on_death: Callable[[], None],
    ) -> None:
        self._address = address
        self._router = router
        self._authenticator = authenticator
        self._limits = limits
        self._services = services
        self._metrics = metrics
        self._on_death = on_death
        self._calls: dict[int, _NativeCall] = {}
        self._folder = ""
        self._front: NativeGrpcFront | None = None
        self._behind: GrpcioTransport | None = None
        self._relieving = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        return 0 if self._front is None else self._front.bound_port

    def start(self) -> None:
        """Raises OSError when the address cannot be bound."""
        self._front = front = NativeGrpcFront(
            self._address,
            [(method, False) for method in self._router.methods],
            io_threads=_IO_THREADS,
            call_details=True,
            keepalive_time_ms=self._limits.keepalive_ms,
            keepalive_timeout_ms=self._limits.keepalive_timeout_ms,
            max_concurrent_streams=self._limits.max_concurrent_streams,
        )
        self._folder = tempfile.mkdtemp(prefix="rafaga-")  # private to this user
        socket = f"{self._folder}/behind.sock"
        self._behind = GrpcioTransport(
            f"unix:{socket}",
            Router({}, self._authenticator, self._metrics, self._limits.max_request_bytes),
            self._authenticator,
            Limits(self._limits.max_request_bytes, _BEHIND_CALLS),
            services=self._services,
        )
        self._behind.start()
        front.set_fallback(socket)
        front.start()
        self._begin()

    def close(self, grace_s: float) -> None:
        if self._front is None or self._behind is None:
            return
        # Replies that are handed over but not written yet would be lost at close.
        time.sleep(min(PAUSE_BEFORE_CLOSE_S, grace_s))
        self._front.close()
        with self._relieving:
            receiving = self._thread
        if receiving is not None:
            receiving.join(5)
        self._behind.close(0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self, steps: Iterable[Step] = ()) -> None:
        """Raises RuntimeError when the system gives no thread."""
        thread = threading.Thread(target=self._receive, args=(_Turn(steps),), name="native-receive", daemon=True)
        thread.start()
        self._thread = thread

    def _relieve(self, turn: _Turn) -> None:
        """The thread that receives hangs in a run: another takes its place, and what it had left to run."""
        with self._relieving:
            if turn.over:
                return
            turn.over = True
            try:
                self._begin(turn.steps)
            except RuntimeError:
                _LOG.critical("nobody receives calls any more: only a new process helps", exc_info=True)
                self._on_death()

    def _receive(self, turn: _Turn) -> None:
        front, methods = self._front, self._router.methods
        assert front is not None
        on_hung = partial(self._relieve, turn)
        while (events := front.recv_batch_details(_MAX_EVENTS, 0 if turn.steps else None)) is not None:
            for kind, call_id, method, payload, _, details in events:
                try:
                    if kind == EVENT_CALL and payload is not None and details is not None:
                        arrived = _NativeCall(front, self._calls, call_id, methods[method], payload, details)
                        self._calls[call_id] = arrived
                        self._router.dispatch(arrived)
                        if arrived.step is not None:
                            turn.steps.add(arrived.step)
                    elif (call := self._calls.get(call_id)) is not None:
                        call.cancel()
                except Exception:
                    # This thread serves everybody: nothing that one call does may end it.
                    _LOG.exception("a call could not be dispatched")
                    front.fail(call_id, grpc.StatusCode.INTERNAL.value[0], "the server failed on this request")
            # One batch of each quick model: meanwhile more requests arrive, for the next.
            for step in list(turn.steps):
                more = step(on_hung)
                if turn.over:
                    return
                if not more:
                    turn.steps.discard(step)


class _Turn:
    """One thread's time as the one that receives. steps: of the models that may have more to run."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.steps = set(steps)
        self.over = False


class _NativeCall(Call):
    may_run = True

    def __init__(
        self,
        front: NativeGrpcFront,
        calls: dict[int, _NativeCall],
        call_id: int,
        method: str,
        payload: bytes,
        details: tuple[Metadata, str, float | None],
    ) -> None:
        self._metadata, self._peer, remaining = details
        super().__init__(method, payload, math.inf if remaining is None else time.monotonic() + remaining)
        self.call_id = call_id
        self._front = front
        self._calls = calls

    @property
    def metadata(self) -> Metadata:
        return self._metadata

    @property
    def peer(self) -> str:
        return self._peer

    def _send(self, payload: bytes) -> None:
        self._calls.pop(self.call_id, None)
        self._front.respond(self.call_id, payload)

    def _send_failure(self, status: Status) -> None:
        self._calls.pop(self.call_id, None)
        # The front keeps this key for itself; RetryInfo in the status details says the same.
        trailing = [(key, value) for key, value in status.trailing_metadata if key != PUSHBACK_KEY]
        self._front.fail(self.call_id, status.code.value[0], status.message, trailing)

    def _let_go(self) -> None:
        self._calls.pop(self.call_id, None)
