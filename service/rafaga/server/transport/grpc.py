"""The default transport: grpcio's server. TLS, limits enforced before a message is buffered, every platform.

A call holds one handler thread from its arrival to its reply. There are more threads than the Router lets calls be in
flight, so none ever waits for a thread: the Router refuses what comes beyond with a reason, and health probes are
answered while it does. grpcio itself refuses, without a reason, only what comes beyond the spare threads too.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import grpc

from rafaga.errors import RafagaError, Status, to_status
from rafaga.server.services.open_inference.stream import MAX_STREAMS
from rafaga.server.transport.calls import Authenticator, Call, Metadata, Router, share
from rafaga.server.transport.health import MAX_WATCHES

# For health, reflection, streams, and calls that the Router is about to refuse.
_SPARE_THREADS = MAX_WATCHES + MAX_STREAMS + 64

# Handlers whose calls have ended may take so long to notice.
_LAST_MOMENTS_S = 1.0
PAUSE_BEFORE_CLOSE_S = 0.2

# Calls whose headers have arrived and that Python has not looked at yet: a few kilobytes each.
_MAX_PENDING_CALLS = 8192

# Probes of orchestrators carry no token, and health tells nothing but up or down.
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
    """What one server takes. Both transports honour these; how strictly is in docs/transports.md.

    keepalive_ms: between pings that find a dead peer, which has keepalive_timeout_ms to answer.
    min_ping_interval_ms: of clients' own pings; those that ping more often are sent away.
    """

    max_request_bytes: int
    max_concurrent_calls: int
    max_concurrent_streams: int = 1024  # of one connection
    keepalive_ms: int = 60_000
    keepalive_timeout_ms: int = 20_000
    min_ping_interval_ms: int = 10_000


class GrpcioTransport:
    """`address` is "host:port" or "unix:/path". `services` add what grpcio serves itself: health and reflection."""

    def __init__(
        self,
        address: str,
        router: Router,
        authenticator: Authenticator,
        limits: Limits,
        tls: Tls | None = None,
        services: Sequence[Callable[[grpc.Server], None]] = (),
    ) -> None:
        self._address = address
        self._router = router
        self._authenticator = authenticator
        self._limits = limits
        self._tls = tls
        self._services = services
        self._server: grpc.Server | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._port = 0

    @property
    def port(self) -> int:
        return self._port

    def start(self) -> None:
        """Raises OSError when the address cannot be bound."""
        most = self._limits.max_concurrent_calls
        threads = most + 2 * share(most) + _SPARE_THREADS  # see InFlight
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="call")
        self._server = server = grpc.server(
            self._pool,
            interceptors=[_Gate(self._authenticator, self._router)] if self._authenticator.required else [],
            options=self._options(),
            maximum_concurrent_rpcs=threads,
        )
        for service, methods in _by_service(self._router.methods).items():
            handlers = {name: self._method(path) for name, path in methods}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        for add_to in self._services:
            add_to(server)
        try:
            if self._tls is None:
                self._port = server.add_insecure_port(self._address)
            else:
                self._port = server.add_secure_port(self._address, self._tls.credentials())
        except RuntimeError:
            raise _cannot_bind(self._address) from None
        server.start()

    def close(self, grace_s: float) -> None:
        if self._server is not None and self._pool is not None:
            # Calls that are on their way while grpcio closes end as CANCELLED. Until their callers have heard that the
            # server is draining, the port stays open.
            time.sleep(min(PAUSE_BEFORE_CLOSE_S, grace_s))
            # Then every call has ended; a handler that still works is not waited for.
            self._server.stop(grace_s).wait(grace_s + _LAST_MOMENTS_S)
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _options(self) -> list[tuple[str, Any]]:
        return [
            ("grpc.max_receive_message_length", self._limits.max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", self._limits.max_concurrent_streams),
            # Beyond the first number grpcio's core cancels waiting calls at random, beyond the second all. Its defaults
            # are one and three connections' worth. A caller should rather be told that it is refused.
            ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", 2 * _MAX_PENDING_CALLS),
            # A second server on the same port would take half of the calls without anybody noticing.
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

    def _method(self, path: str) -> grpc.RpcMethodHandler[bytes, bytes]:
        router = self._router

        def serve(request: bytes, context: grpc.ServicerContext) -> bytes:
            call = _GrpcioCall(path, request, context)
            router.dispatch(call)
            # grpcio runs the callback at the end of every call; after a reply or a failure, cancel does nothing. Only
            # now, because a call must be booked before it can be cancelled.
            if not context.add_callback(call.cancel):
                call.cancel()
            return call.wait()

        return grpc.unary_unary_rpc_method_handler(serve)


class _GrpcioCall(Call):
    def __init__(self, method: str, request: bytes, context: grpc.ServicerContext) -> None:
        remaining = context.time_remaining()
        super().__init__(method, request, math.inf if remaining is None else time.monotonic() + remaining)
        self._context = context
        self._payload = b""
        self._status: Status | None = None
        self._answered = threading.Lock()
        self._answered.acquire()

    @property
    def metadata(self) -> Metadata:
        return cast("Metadata", self._context.invocation_metadata())  # named pairs

    @property
    def peer(self) -> str:
        return str(self._context.peer())

    def wait(self) -> bytes:
        """Parks the handler thread until the call is finished; gives the reply or ends the call with its status."""
        self._answered.acquire()
        if self._status is not None:
            _abort(self._context, self._status)
        return self._payload

    def _send(self, payload: bytes) -> None:
        self._payload = payload
        self._answered.release()

    def _send_failure(self, status: Status) -> None:
        self._status = status
        self._answered.release()

    def _let_go(self) -> None:
        self._answered.release()


class _Gate(grpc.ServerInterceptor):
    """Asks for the token before the request is read: a stranger cannot make the server buffer or wait."""

    def __init__(self, authenticator: Authenticator, router: Router) -> None:
        self._authenticator = authenticator
        self._router = router

    def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method
        if not method.startswith(_OPEN_SERVICE):
            try:
                self._authenticator.check(
                    tuple((key, value) for key, value in handler_call_details.invocation_metadata)
                )
            except RafagaError as error:
                self._router.book_refusal(method, error)
                return _refusing(error)
        return continuation(handler_call_details)


def _refusing(error: RafagaError) -> Any:
    """A handler that only fails. Streaming, whatever the method is: grpcio reads a unary request before it calls."""

    def refuse(_: object, context: grpc.ServicerContext) -> NoReturn:
        _abort(context, to_status(error))

    return grpc.stream_stream_rpc_method_handler(refuse)


def _abort(context: grpc.ServicerContext, status: Status) -> NoReturn:
    context.set_trailing_metadata(status.trailing_metadata)
    context.abort(status.code, status.message)


def _cannot_bind(address: str) -> OSError:
    """Why not: grpcio tells no more than that it failed, so the plain way is tried."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, int(port)), family=family).close()
    except OSError as error:
        code = error.errno or 0
        return OSError(code, os.strerror(code) if code > 0 else "no such host", address)
    except ValueError:
        pass  # no port in it: a Unix socket
    return OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL), address)


def _by_service(methods: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """{"rafaga.v1.Vision": [("Classify", "/rafaga.v1.Vision/Classify"), …]}"""
    services: dict[str, list[tuple[str, str]]] = {}
    for path in methods:
        _, service, name = path.split("/")
        services.setdefault(service, []).append((name, path))
    return services
