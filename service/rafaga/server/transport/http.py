"""The HTTP port: /metrics for Prometheus, /healthz (no restart is required) and /readyz (every model is served)."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from functools import partial
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from rafaga.addresses import joined

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


_POLL_S = 0.1  # closing waits as long
_UNAVAILABLE = "503 Service Unavailable"
_RESTART = "a restart is required"


class HttpServer:
    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        unready: Callable[[], str],
        alive: Callable[[], bool] = lambda: True,
    ) -> None:
        """`unready`: why the server is not ready, empty if it is."""
        self._address = (host, port)
        self._application = _application(registry, unready, alive)
        self._server: WSGIServer | None = None

    @property
    def port(self) -> int:
        return 0 if self._server is None else self._server.server_port

    def start(self) -> None:
        """Raises OSError when the address cannot be bound."""
        try:
            self._server = _Server(*self._address)
        except OSError as error:
            raise OSError(error.errno, error.strerror, joined(*self._address)) from None
        self._server.set_app(self._application)
        serve = partial(self._server.serve_forever, _POLL_S)
        threading.Thread(target=serve, name="http", daemon=True).start()

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        if host == "::" and not socket.has_dualstack_ipv6():
            host = "0.0.0.0"  # as gRPC's core does where the machine has no IPv6
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # IPv4 first: a name of both versions, such as localhost, is answered as before.
        self.address_family, *_, address = min(found, key=lambda entry: entry[0])
        super().__init__(address, _Handler)  # type: ignore[arg-type]  # IPv6 addresses have four parts

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            # "::" means every address, of IPv4 too, whatever the system's default is.
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _Handler(WSGIRequestHandler):
    timeout = 10  # a client that sends nothing must not hold its thread forever

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class named it
        """No lines for scrapes and probes."""


def _application(registry: CollectorRegistry, unready: Callable[[], str], alive: Callable[[], bool]) -> WSGIApplication:
    metrics: WSGIApplication = make_wsgi_app(registry)

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def answer(status: str, text: str) -> Iterable[bytes]:
            start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [text.encode()]

        match environ["PATH_INFO"]:
            case "/metrics":
                return metrics(environ, start_response)
            case "/healthz":
                return answer("200 OK", "alive\n") if alive() else answer(_UNAVAILABLE, f"{_RESTART}\n")
            case "/readyz":
                why = unready() or ("" if alive() else _RESTART)
                return answer(_UNAVAILABLE, f"not ready: {why}\n") if why else answer("200 OK", "ready\n")
            case _:
                return answer("404 Not Found", "there are /metrics, /healthz and /readyz\n")

    return application
