"""The gRPC server: address, TLS, limits; calls come through `completion_queue`, or through `blocking` where they must.

Limits hold in grpcio's C core, before a message is buffered. The number of calls in flight is bounded by the Router.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from rafaga.addresses import UNIX
from rafaga.errors import RafagaError, to_status
from rafaga.server.transport import blocking
from rafaga.server.transport.completion_queue import CompletionQueueLoop, unsupported
from rafaga.server.transport.health import MAX_WATCHES
from rafaga.server.transport.router import Authenticator, Router

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

# Probes of orchestrators carry no token, and health shows nothing but up or down.
_OPEN_SERVICE = "/grpc.health.v1.Health/"


@dataclass(frozen=True)
class Tls:
    """PEM files' contents. `client_ca` asks for client certificates signed by it (mTLS)."""

    private_key: bytes
    certificate_chain: bytes
    client_ca: bytes | None = None

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials(
            [(self.private_key, self.certificate_chain)],
            root_certificates=self.client_ca,
            require_client_auth=self.client_ca is not None,
        )


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
    max_receiving_calls: int = 4096
    keepalive_ms: int = 60_000
    keepalive_timeout_ms: int = 20_000
    min_ping_interval_ms: int = 10_000
    max_connection_age_ms: int | None = None
    max_connection_age_grace_ms: int | None = None
    max_connection_idle_ms: int | None = None


class GrpcTransport:
    """Owns sockets and nothing else. `address` is "host:port" or "unix:/path".

    services: add what grpcio itself serves: health, reflection, streams. blocking: handlers of the router may block.
    on_death: called when the transport cannot receive calls any more.
    """

    def __init__(
        self,
        address: str,
        router: Router,
        authenticator: Authenticator,
        limits: Limits,
        tls: Tls | None = None,
        services: Sequence[Callable[[grpc.Server], None]] = (),
        *,
        blocking: bool = False,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._address = address
        self._router = router
        self._authenticator = authenticator
        self._limits = limits
        self._tls = tls
        self._services = services
        self._blocking = blocking
        self._on_death = on_death
        self._server: grpc.Server | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._port = 0

    @property
    def port(self) -> int:
        """The bound port, once started."""
        return self._port

    def start(self) -> None:
        """Raises OSError when the address cannot be bound."""
        if not self._blocking and (why := unsupported()) is not None:
            _LOG.warning(
                "grpcio %s is not a version this server knows how to drive (%s): "
                "serving through its public API, which is several times slower for small models",
                grpc.__version__,
                why,
            )
            self._blocking = True
        threads = _SERVICE_THREADS + (_BLOCKING_CALLS if self._blocking else 0)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="grpc")
        self._server = server = grpc.server(
            self._pool,
            interceptors=[_TokenCheck(self._authenticator)] if self._authenticator.required else [],
            options=self._options(),
            maximum_concurrent_rpcs=threads,
        )
        for add_to in self._services:
            add_to(server)
        if self._blocking:
            blocking.add_to(server, self._router)
        if self._address.startswith(UNIX):
            _refuse_taken_socket(self._address)
        try:
            if self._tls is None:
                self._port = server.add_insecure_port(self._address)
            else:
                self._port = server.add_secure_port(self._address, self._tls.credentials())
        except RuntimeError:
            raise _bind_error(self._address) from None
        if self._blocking:
            server.start()
        else:
            CompletionQueueLoop(server, self._router, self._limits.max_receiving_calls, self._on_death).start()

    def close(self, grace_s: float) -> None:
        """Takes no new calls, lets replies leave for `grace_s`, then closes every connection."""
        if self._server is not None and self._pool is not None:
            # Calls on their way while grpcio closes end as CANCELLED. The port stays open until callers have heard that
            # the server is draining.
            time.sleep(min(PAUSE_BEFORE_CLOSE_S, grace_s))
            # A handler that still works after its call has ended is not waited for.
            self._server.stop(grace_s).wait(grace_s + _HANDLER_GRACE_S)
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _options(self) -> list[tuple[str, Any]]:
        limits = self._limits
        optional = [
            ("grpc.max_connection_age_ms", limits.max_connection_age_ms),
            ("grpc.max_connection_age_grace_ms", limits.max_connection_age_grace_ms),
            ("grpc.max_connection_idle_ms", limits.max_connection_idle_ms),
        ]
        return [
            *((name, value) for name, value in optional if value is not None),
            ("grpc.max_receive_message_length", self._limits.max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", self._limits.max_concurrent_streams),
            # Beyond the first number grpcio's core cancels waiting calls at random, beyond the second all. Its defaults
            # are one and three connections' worth. A refusal by the Router says why and when to retry.
            ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", 2 * _MAX_PENDING_CALLS),
            # A second server on the same port would silently take half of the calls.
            ("grpc.so_reuseport", 0),
            # Identity only: a compressed message can inflate a thousandfold.
            ("grpc.compression_enabled_algorithms_bitset", 1),
            ("grpc.keepalive_time_ms", self._limits.keepalive_ms),
            ("grpc.keepalive_timeout_ms", self._limits.keepalive_timeout_ms),
            # Otherwise the core waits a minute for the answer, whatever the line above says.
            ("grpc.http2.ping_timeout_ms", self._limits.keepalive_timeout_ms),
            ("grpc.http2.min_ping_interval_without_data_ms", self._limits.min_ping_interval_ms),
            ("grpc.keepalive_permit_without_calls", 1),
        ]


class _TokenCheck(grpc.ServerInterceptor):
    """Asks for the token before the request is read: a caller without one cannot make the server buffer or wait."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if not handler_call_details.method.startswith(_OPEN_SERVICE):
            error = self._authenticator.refusal(
                tuple((key, value) for key, value in handler_call_details.invocation_metadata)
            )
            if error is not None:
                return _refusing(error)
        return continuation(handler_call_details)


def _refusing(error: RafagaError) -> Any:
    """A handler that only fails. Streaming, whatever the method is: grpcio reads a unary request before it calls."""

    def refuse(_: object, context: grpc.ServicerContext) -> NoReturn:
        blocking.abort(context, to_status(error))

    return grpc.stream_stream_rpc_method_handler(refuse)


def _refuse_taken_socket(address: str) -> None:
    """Raises OSError if a process listens on this Unix socket: the core would remove it and take its place."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(address.removeprefix(UNIX))
        except OSError:
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), address)


def _bind_error(address: str) -> OSError:
    """The reason, which grpcio does not give: found by binding a plain socket."""
    if address.startswith(UNIX):
        return _unix_bind_error(address)
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, int(port)), family=family).close()
    except OSError as error:
        code = error.errno or 0
        return OSError(code, os.strerror(code) if code > 0 else "no such host", address)
    return OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL), address)


def _unix_bind_error(address: str) -> OSError:
    path = address.removeprefix(UNIX)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(path)
        os.unlink(path)
    except OSError as error:
        return OSError(error.errno or errno.ENAMETOOLONG, error.strerror or str(error), address)
    return OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL), address)
