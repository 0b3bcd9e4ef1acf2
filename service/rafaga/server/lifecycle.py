"""The life of a server: ports open → loading → serving → draining → stopped, driven by signals."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from rafaga.server.config.settings import Config
from rafaga.server.repository.repository import Poller, Repository
from rafaga.server.services.decoding import DecodePool
from rafaga.server.services.open_inference.stream import Streams
from rafaga.server.transport.expiry import Expiry
from rafaga.server.transport.grpc import GrpcTransport
from rafaga.server.transport.health import Health
from rafaga.server.transport.http import HttpServer
from rafaga.server.transport.router import Router

if TYPE_CHECKING:  # needs the extra `tracing`
    from rafaga.server.transport.tracing import Tracer

_LOG = logging.getLogger(__name__)

# At the end only: nothing signals that the last call has ended.
_POLL_S = 0.01
# How long the transport may take to send the last replies.
_REPLY_GRACE_S = 5.0
# SIGHUP: the terminal was closed. By default it would end the process without a drain.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(eq=False, kw_only=True)
class Server:
    config: Config
    repository: Repository
    health: Health
    router: Router
    workers: DecodePool
    streams: Streams
    expiry: Expiry
    transport: GrpcTransport
    admin: GrpcTransport | None
    poller: Poller | None
    http: HttpServer
    tracer: Tracer | None = None
    _loaded: bool = field(default=False, init=False)
    _stopping: bool = field(default=False, init=False)

    @property
    def grpc_port(self) -> int:
        return self.transport.port

    @property
    def admin_port(self) -> int | None:
        return None if self.admin is None else self.admin.port

    @property
    def http_port(self) -> int:
        return self.http.port

    def start(self) -> None:
        """Raises FileNotFoundError without a repository, OSError when a port is taken."""
        self.open()
        self.load()

    def open(self) -> None:
        """Opens the ports: the server is live, but not ready. Raises OSError when one is taken."""
        try:
            self.http.start()
            self.transport.start()
            if self.admin is not None:
                self.admin.start()
        except BaseException:
            self._close(0.0)
            raise

    def load(self) -> None:
        """Loads all models; each is served once it is loaded. Raises FileNotFoundError without a repository.

        `drain_and_stop` may run at the same time: then it returns after the model that is being loaded.
        """
        models = self.config.models
        _LOG.info("loading models", extra={"repository": str(models.repository), **self._addresses})
        try:
            self.repository.load(models.load_models)
            self._warn_of_unknown_models()
        except BaseException:
            if not self._stopping:
                self._close(0.0)
            raise
        if self._stopping:
            return
        self._loaded = True
        if self.poller is not None:
            self.poller.start()
        _LOG.info("serving", extra={**self._addresses, "ready": self.repository.ready})

    @property
    def _addresses(self) -> dict[str, object]:
        network = self.config.network
        found: dict[str, object] = {"host": network.host, "grpc_port": self.grpc_port}
        if network.grpc_socket is not None:
            found["grpc_socket"] = str(network.grpc_socket)
        return found | {"http_port": self.http_port, "admin_port": self.admin_port}

    def drain_and_stop(self, hurry: threading.Event | None = None) -> bool:
        """Refuses new calls, finishes accepted ones, and stops. True if all accepted calls were answered in time.

        Setting `hurry` ends all waiting.
        """
        hurry = hurry or threading.Event()
        self._stopping = True
        self.repository.withdraw()
        if self.poller is not None:
            self.poller.close()
        if self.admin is not None:
            self.admin.close(0.0)
        if self._loaded:
            # Balancers see that it is not ready and stop sending; until they do, calls are still served. While models
            # loaded it was never ready, and they sent nothing.
            hurry.wait(self.config.network.drain_delay_s)
        self.router.drain()
        clean = self._wait_for_calls(hurry)
        # Not earlier: a call accepted before the drain may not have reached its queue yet.
        self.repository.drain()
        self._close(0.0 if hurry.is_set() else _REPLY_GRACE_S)
        _LOG.info("stopped", extra={"clean": clean})
        return clean

    def _close(self, grace_s: float) -> None:
        """`grace_s`: how long the transport may take to send replies."""
        self.health.close()
        self.streams.close()
        self.transport.close(grace_s)
        if self.admin is not None:
            self.admin.close(0.0)
        self.expiry.close()
        self.repository.close()
        self.workers.close()
        self.http.close(grace_s)
        if self.tracer is not None:
            self.tracer.close()

    def _warn_of_unknown_models(self) -> None:
        known = {name for name, _ in self.repository.on_disk()}
        for name in self.config.named_models - known:
            _LOG.warning("per-model settings name an unknown model", extra={"model": name})

    def _wait_for_calls(self, hurry: threading.Event) -> bool:
        end = time.monotonic() + self.config.network.drain_timeout_s
        while (left := self.router.in_flight.count) and time.monotonic() < end and not hurry.wait(_POLL_S):
            pass
        if left:
            _LOG.error("stopping with unanswered calls", extra={"calls": left})
        return not left


def run(server: Server, serving: Callable[[Server], None] | None = None) -> int:
    """Serves until SIGTERM, SIGINT or SIGHUP. Returns the exit code: 0 if all accepted calls were answered.

    `serving` is called once all models are loaded.

    The first signal drains the server; a second one ends the drain. After a signal while models load, the caller must
    end the process: the thread that loads is still running.
    """
    with ShutdownSignals() as signals:
        server.open()
        loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        loading = loader.submit(server.load)
        loader.shutdown(wait=False)
        wait((loading, signals.first), return_when=FIRST_COMPLETED)
        if loading.done():
            loading.result()  # raises what load raised
            if serving is not None:
                serving(server)
            # Objects that exist now live as long as the server: later collections, which pause every thread, skip them.
            gc.collect()
            gc.freeze()
        else:
            _LOG.info("stopping while models are loading")
        signals.first.result()
        _LOG.info("draining: finishing accepted calls; a second signal stops at once")
        clean = server.drain_and_stop(hurry=signals.second)
    return 0 if clean else 1


class ShutdownSignals:
    """Signals that end the server, as long as it is entered: the first completes `first`, the next sets `second`.

    Python runs signal handlers in the main thread, between any two instructions, so a handler must take no lock. The
    handlers here do nothing. A thread reads the signals from a socket, which the interpreter writes them to.
    """

    def __init__(self) -> None:
        self.first: Future[None] = Future()
        self.second = threading.Event()

    def __enter__(self) -> ShutdownSignals:
        self._received, self._sent = socket.socketpair()
        self._sent.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._sent.fileno(), warn_on_full_buffer=False)
        self._handlers_before = {n: signal.signal(n, lambda *_: None) for n in _SIGNALS}
        threading.Thread(target=self._read, name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._sent.close()  # ends the thread

    def _read(self) -> None:
        with self._received:
            while number := self._received.recv(1):
                if number[0] not in self._handlers_before:
                    continue
                if self.first.done():
                    self.second.set()
                else:
                    self.first.set_result(None)
