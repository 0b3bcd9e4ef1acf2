"""The HTTP port: Starlette's routing and uvicorn's HTTP/1.1 in a thread with an event loop of its own.

uvicorn's own server loop is not used, because it wakes up ten times a second. h11 parses: it bounds headers, which
uvicorn's faster parser does not, and large bodies cost it little.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from rafaga.addresses import joined
from rafaga.server.transport.http_calls import json_response
from rafaga.server.transport.tls import Tls

MAX_CONNECTIONS = 512
PATIENCE_S = 75.0
"""How long a client may take for the headers of its next request, and then for its body. Balancers keep idle
connections for a minute: the server must not be the first to close them."""

_LOG = logging.getLogger(__name__)

_HANDSHAKE_S = 10.0
_HANDLER_GRACE_S = 1.0
_BACKLOG = 128
# Of the event loop, from taking a connection from the kernel to `connection_made`.
_ROUNDS_TO_ACCEPT = 3


class HttpServer:
    def __init__(
        self,
        host: str,
        port: int,
        routes: Sequence[Route],
        tls: Tls | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._address = (host, port)
        self._max_connections = max_connections
        self._tls = tls
        self.routes = tuple(routes)
        # Unknown paths must not be redirected to known ones: a redirect repeats the Host header.
        handlers = {HTTPException: _refused, Exception: _failed}
        application = Starlette(routes=list(routes), exception_handlers=handlers)
        application.router.redirect_slashes = False
        self._config = Config(
            application,
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # lower levels have a line for every malformed request
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=round(PATIENCE_S),
        )
        self._state = ServerState()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: asyncio.Server | None = None
        self._thread: threading.Thread | None = None
        self.port = 0  # that is bound, once started

    def start(self) -> None:
        """Raises OSError when the address cannot be bound."""
        try:
            bound = _bound(*self._address)
        except OSError as error:
            named = isinstance(error, socket.gaierror)
            why = error.strerror if named else os.strerror(error.errno or 0)
            raise OSError(error.errno, why, joined(*self._address)) from None
        self.port = bound.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(bound), self._loop).result()

    def close(self, grace_s: float = 0.0) -> None:
        """Takes no new connections, lets answers leave for `grace_s`, then closes every connection."""
        loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._shut_down(grace_s), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    async def _listen(self, bound: socket.socket) -> None:
        self._config.load()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1, thread_name_prefix="http-body"))
        self._listener = await loop.create_server(
            lambda: _Connection(self._config, self._state, {"max_connections": self._max_connections}),
            sock=bound,
            ssl=None if self._tls is None else self._tls.http_context(),
            ssl_handshake_timeout=None if self._tls is None else _HANDSHAKE_S,
            backlog=_BACKLOG,
        )

    async def _shut_down(self, grace_s: float) -> None:
        for _ in range(_ROUNDS_TO_ACCEPT):  # asyncio leaves connections open whose listener closes before
            await asyncio.sleep(0)
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._state.connections):
            if isinstance(connection, _Connection) and connection.waiting_since is not None:
                connection.transport.close()  # also where a handler waits for the rest of a body
            else:
                connection.shutdown()
        # Handlers end when they have answered, and otherwise when their client is gone.
        await self._wait_for_handlers(grace_s)
        for connection in list(self._state.connections):
            connection.transport.abort()
        await self._wait_for_handlers(_HANDLER_GRACE_S)
        await _end_tasks()  # of connections whose TLS handshake is not over
        await asyncio.get_running_loop().shutdown_default_executor()

    async def _wait_for_handlers(self, seconds: float) -> None:
        if self._state.tasks:
            await asyncio.wait(set(self._state.tasks), timeout=seconds)


class _Connection(H11Protocol):
    """Bounds the time that a client may keep a connection waiting, and the number of connections.

    waiting_since: the loop's time since which the server waits for this client; None while it works on an answer.
    """

    waiting_since: float | None = None
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        full = len(self.connections) >= self.app_state["max_connections"]
        super().connection_made(transport)
        self.app_state["certified"] = bool(transport.get_extra_info("peercert"))
        self._wait()
        if full:
            waiting = [c for c in self.connections if isinstance(c, _Connection) and c.waiting_since is not None]
            longest = min(waiting, key=lambda c: c.waiting_since or 0.0)
            longest.transport.abort()
            self.connections.discard(longest)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        self._note_progress(before)

    def on_response_complete(self) -> None:
        self._wait()
        before = self.cycle
        super().on_response_complete()
        self._note_progress(before)  # of a request that was there already

    def _note_progress(self, before: object) -> None:
        if self.cycle is None or self.cycle.response_complete:
            return
        if not self.cycle.more_body:
            self._wait_no_more()
        elif self.cycle is not before:
            self._wait()  # for the body

    def _wait(self) -> None:
        self._wait_no_more()
        self.waiting_since = self.loop.time()
        self._timer = self.loop.call_later(PATIENCE_S, self.transport.abort)

    def _wait_no_more(self) -> None:
        self.waiting_since = None
        if self._timer is not None:
            self._timer.cancel()


async def _end_tasks() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await asyncio.sleep(0)  # sockets are closed in the next round of the loop


def _bound(host: str, port: int) -> socket.socket:
    if host == "::" and not socket.has_dualstack_ipv6():
        host = "0.0.0.0"  # as gRPC's core does where the machine has no IPv6
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # IPv4 first: a name of both versions, such as localhost, is answered as before.
    family, _, _, _, address = min(found, key=lambda entry: entry[0])
    # "::" means every address, of IPv4 too, whatever the system's default is.
    both = family == socket.AF_INET6 and host == "::"
    bound = socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    # Connections inherit it. asyncio sets it only where the socket names its protocol. Without it, the body of an
    # answer would wait 40 ms for the client to acknowledge the head.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bound


async def _refused(_: Request, error: Exception) -> Response:
    """A path or a method that the server does not have."""
    assert isinstance(error, HTTPException)
    return json_response({"error": f"{error.detail}: see /openapi.json"}, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """A bug. The caller gets no detail."""
    _LOG.error("unhandled exception in HTTP request", exc_info=error, extra={"path": request.url.path})
    return json_response({"error": "the server failed on this request; its log has the cause"}, 500)
