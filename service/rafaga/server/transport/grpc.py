"""The gRPC server: address, TLS, limits; calls come through `completion_queue`, or through `blocking` where they must.

Limits hold in grpcio's C core, before a message is buffered. The number of calls in flight is bounded by the Router.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from rafaga.server.transport import blocking, sockets
from rafaga.server.transport.completion_queue import CompletionQueueLoop, unsupported
from rafaga.server.transport.health import MAX_WATCHES
from rafaga.server.transport.interceptors import RequestCheck, TokenCheck
from rafaga.server.transport.router import Authenticator, Router
from rafaga.server.transport.tls import Tls

_LOG = logging.getLogger(__name__)

MAX_STREAMS = 64
"""Open ModelStreamInfer streams; each holds a thread. More are refused: use ModelInfer."""

# Threads of health, reflection and streams, and of refusing what exceeds them.
_SERVICE_THREADS = MAX_WATCHES + MAX_STREAMS + 64
# Threads of unary calls where each holds one.
_BLOCKING_CALLS = 256

# How long handlers whose calls have ended may take to return.
_HANDLER_GRACE_S = 1.0
PAUSE_BEFORE_CLOSE_S = 0.2

# Calls whose headers have arrived and that Python has not taken yet: a few kilobytes each.
_MAX_PENDING_CALLS = 8192


@dataclass(frozen=True)
class Limits:
    """What one server takes; docs/transports.md says how each limit is enforced.

    max_receiving_calls: whose requests have not arrived in full; beyond it the oldest is refused.
    keepalive_ms: between pings that find a dead peer, which has keepalive_timeout_ms to answer. min_ping_interval_ms:
    clients that ping more often are disconnected. max_connection_age_ms: the core varies it by a tenth; None: no limit.
    max_connection_age_grace_ms: how long the calls of such a connection may then take. max_connection_idle_ms: without
    a call; None: no limit.
    """

    max_request_bytes: int
    max_concurrent_streams: int = 1024  # of one connection
    max_connections: int = 4096
    max_receiving_calls: int = 4096
    keepalive_ms: int = 60_000
    keepalive_timeout_ms: int = 20_000
    min_ping_interval_ms: int = 10_000
    max_connection_age_ms: int | None = None
    max_connection_age_grace_ms: int | None = None
    max_connection_idle_ms: int | None = None


@dataclass(eq=False)
class GrpcTransport:
    """Owns sockets and nothing else. `address` is "host:port" or "unix:/path".

    services: add what grpcio itself serves: health, reflection, streams. blocking: handlers of the router may block.
    on_death: called when the transport cannot receive calls any more. port: that is bound, once started.
    """

    address: str
    router: Router
    authenticator: Authenticator
    limits: Limits
    tls: Tls | None = None
    services: Sequence[Callable[[grpc.Server], None]] = ()
    blocking: bool = False
    on_death: Callable[[], None] = lambda: None
    _server: grpc.Server | None = field(default=None, init=False)
    _pool: ThreadPoolExecutor | None = field(default=None, init=False)
    _loop: CompletionQueueLoop | None = field(default=None, init=False)
    port: int = field(default=0, init=False)

    def start(self) -> None:
        """Raises OSError when the address cannot be bound."""
        if not self.blocking and (why := unsupported()) is not None:
            _LOG.warning(
                "grpcio %s is not a version this server knows how to drive (%s): "
                "serving through its public API, which is several times slower for small models",
                grpc.__version__,
                why,
            )
            self.blocking = True
        threads = _SERVICE_THREADS + (_BLOCKING_CALLS if self.blocking else 0)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="grpc")
        self._server = server = grpc.server(
            self._pool,
            interceptors=[TokenCheck(self.authenticator), RequestCheck()],
            options=self._options(),
            maximum_concurrent_rpcs=threads,
        )
        for add_to in self.services:
            add_to(server)
        if self.blocking:
            blocking.add_to(server, self.router)
        sockets.refuse_taken(self.address)
        try:
            if self.tls is None:
                self.port = server.add_insecure_port(self.address)
            else:
                self.port = server.add_secure_port(self.address, self.tls.grpc_credentials())
        except RuntimeError:
            raise sockets.bind_error(self.address) from None
        if self.blocking:
            server.start()
        else:
            self._loop = CompletionQueueLoop(server, self.router, self.limits.max_receiving_calls, self.on_death)
            self._loop.start()

    def close(self, grace_s: float) -> None:
        """Takes no new calls, lets replies leave for `grace_s`, then closes every connection."""
        if self._server is not None and self._pool is not None:
            # The port stays open until callers know that the server is draining.
            time.sleep(min(PAUSE_BEFORE_CLOSE_S, grace_s))
            if self._loop is not None:
                self._loop.flush(grace_s)
                # Calls that arrive while grpcio stops would end as CANCELLED. A connection that ends is UNAVAILABLE.
                # Without the loop it is not known which replies have left: only stop() waits for them.
                sockets.hang_up(self.address, self.port)
            # A handler that still works after its call has ended is not waited for.
            self._server.stop(grace_s).wait(grace_s + _HANDLER_GRACE_S)
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _options(self) -> list[tuple[str, Any]]:
        limits = self.limits
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", limits.max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", limits.max_concurrent_streams),
            ("grpc.max_allowed_incoming_connections", limits.max_connections),
            # Beyond the first number grpcio's core cancels waiting calls at random, beyond the second all. Its defaults
            # are one and three connections' worth. A refusal by the Router says why and when to retry.
            ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", 2 * _MAX_PENDING_CALLS),
            # A second server on the same port would silently take half of the calls.
            ("grpc.so_reuseport", 0),
            # Identity only: a compressed message can inflate a thousandfold.
            ("grpc.compression_enabled_algorithms_bitset", 1),
            ("grpc.keepalive_time_ms", limits.keepalive_ms),
            ("grpc.keepalive_timeout_ms", limits.keepalive_timeout_ms),
            # Otherwise the core waits a minute for the answer, whatever the line above says.
            ("grpc.http2.ping_timeout_ms", limits.keepalive_timeout_ms),
            ("grpc.http2.min_ping_interval_without_data_ms", limits.min_ping_interval_ms),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_connection_age_ms", limits.max_connection_age_ms),
            ("grpc.max_connection_age_grace_ms", limits.max_connection_age_grace_ms),
            ("grpc.max_connection_idle_ms", limits.max_connection_idle_ms),
        ]
        return [(name, value) for name, value in options if value is not None]
