"""The life of a server: loading → serving → draining → stopped, and the signals that end it."""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rafaga.server.config.settings import Config
from rafaga.server.repository.poller import Poller
from rafaga.server.repository.repository import Repository
from rafaga.server.services.decoding import DecodePool
from rafaga.server.services.open_inference.stream import Streams
from rafaga.server.transport.expiry import Expiry
from rafaga.server.transport.grpc import GrpcTransport
from rafaga.server.transport.health import Health
from rafaga.server.transport.http import HttpServer
from rafaga.server.transport.router import Router

if TYPE_CHECKING:  # an extra of its own
    from rafaga.server.transport.tracing import Tracer

_LOG = logging.getLogger(__name__)

# How long replies that were handed to the transport may take to leave.
_REPLY_GRACE_S = 5.0


class Server:
    def __init__(
        self,
        config: Config,
        *,
        repository: Repository,
        health: Health,
        router: Router,
        workers: DecodePool,
        streams: Streams,
        expiry: Expiry,
        transport: GrpcTransport,
        admin: GrpcTransport | None,
        poller: Poller | None,
        http: HttpServer,
        tracer: Tracer | None = None,
    ) -> None:
        self._config = config
        self.repository = repository
        self._health = health
        self._router = router
        self._workers = workers
        self._streams = streams
        self._expiry = expiry
        self._transport = transport
        self._admin = admin
        self._poller = poller
        self._http = http
        self._tracer = tracer

    @property
    def grpc_port(self) -> int:
        return self._transport.port

    @property
    def admin_port(self) -> int | None:
        return None if self._admin is None else self._admin.port

    @property
    def http_port(self) -> int:
        return self._http.port

    def start(self) -> None:
        """Loads and warms every model, then opens the gRPC port.

        HTTP comes first, so that a liveness probe is answered while models load. Raises FileNotFoundError without a
        repository, OSError when a port is taken.
        """
        self._http.start()
        try:
            self.repository.load(self._config.load_models)
            self._transport.start()
            if self._admin is not None:
                self._admin.start()
        except BaseException:
            self._transport.close(0.0)
            self.repository.close()
            self._workers.close()
            self._http.close()
            raise
        self._health.server(lambda: self.repository.ready)
        if self._poller is not None:
            self._poller.start()
        _LOG.info(
            "serving",
            extra={
                "host": self._config.host,
                "grpc_port": self.grpc_port,
                "http_port": self.http_port,
                "admin_port": self.admin_port,
                "ready": self.repository.ready,
            },
        )

    def drain_and_stop(self, hurry: threading.Event | None = None) -> bool:
        """Answers what was accepted, refuses what comes, and stops. True when everything was answered in time.

        `hurry`, once set, ends the waiting.
        """
        hurry = hurry or threading.Event()
        # Balancers that watch health go elsewhere; those that do not, find the port open for drain_delay_s.
        self._health.drain()
        if self._poller is not None:
            self._poller.close()
        if self._admin is not None:
            self._admin.close(0.0)
        hurry.wait(self._config.drain_delay_s)
        self._router.drain()
        clean = self._wait_for_calls(hurry)
        # Only now may the queues refuse: a call accepted before may still have been on its way to one.
        self.repository.drain()
        self._health.close()
        self._streams.close()
        self._transport.close(0.0 if hurry.is_set() else _REPLY_GRACE_S)
        self._expiry.close()
        self.repository.close()
        self._workers.close()
        self._http.close()
        if self._tracer is not None:
            self._tracer.close()
        _LOG.info("stopped", extra={"clean": clean})
        return clean

    def _wait_for_calls(self, hurry: threading.Event) -> bool:
        end = time.monotonic() + self._config.drain_timeout_s
        while not hurry.is_set() and time.monotonic() < end:
            if self._router.in_flight.wait_until_none(min(0.1, max(0.0, end - time.monotonic()))):
                return True
        left = self._router.in_flight.count
        if left:
            _LOG.error("stopping with calls unanswered", extra={"calls": left})
        return not left


_SIGNAL_SLICE_S = 0.2


class ShutdownSignals:
    """Catches SIGTERM and SIGINT while entered, and gives the old handlers back."""

    def __init__(self) -> None:
        self._first = threading.Event()
        self.second = threading.Event()
        # A handler interrupts this thread anywhere, also where it holds an Event's lock: setting the Event there would
        # wait for itself. Putting into a SimpleQueue is safe, and another thread sets the Events.
        self._caught: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> ShutdownSignals:
        threading.Thread(target=self._tell, name="signals", daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, lambda number, _: self._caught.put(number))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._caught.put(None)

    def wait(self) -> None:
        # In slices: the handlers run in this thread alone, and a signal that comes in the moment before it sleeps does
        # not wake it.
        while not self._first.wait(_SIGNAL_SLICE_S):
            pass

    def _tell(self) -> None:
        while self._caught.get() is not None:
            if self._first.is_set():
                self.second.set()
            self._first.set()
