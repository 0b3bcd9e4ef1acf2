"""grpc.health.v1: "" for the server, the name of a model for that model, and "rafaga.v1.Catalog" for liveness probes.

grpcio's own servicer sends to its watchers while it holds its lock: a watcher that hangs up or does not read at that
moment blocks the drain and every other call forever. Here a watcher blocks only itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from rafaga.v1 import catalog_pb2

_SERVER = ""
# Needs no model, so it is SERVING from when the port opens. Liveness probes must not restart a server that loads models
# or refused a bundle, only one that cannot recover.
_CATALOG = catalog_pb2.DESCRIPTOR.services_by_name["Catalog"].full_name

RESTART = "a restart is required"

MAX_WATCHES = 64
"""Open Watches; each holds a thread. More are refused: use Check."""


class Health:
    """Every signal of the server's health comes from here: grpc.health, /readyz, /healthz, the Open Inference Protocol.

    Holds no state of models: it asks at every Check, and again for every Watch after `changed`. unready: why the server
    is not ready, empty if it is. serves: whether a model is served. alive: False once a restart is required.
    """

    def __init__(
        self, unready: Callable[[], str], serves: Callable[[str], bool], alive: Callable[[], bool] = lambda: True
    ) -> None:
        self._unready = unready
        self._serves = serves
        self._alive = alive
        self._known = {_SERVER}
        self._changed = threading.Condition()
        self._dead = False
        self._closed = False

    @property
    def alive(self) -> bool:
        return not self._dead and self._alive()

    @property
    def unready_because(self) -> str:
        """Empty if the server is ready."""
        return self._unready() if self.alive else RESTART

    def changed(self, model: str = _SERVER) -> None:
        """The state of the server or of `model` may have changed. A model is known from its first change on."""
        with self._changed:
            self._known.add(model)
            self._changed.notify_all()

    def die(self) -> None:
        """From now on a restart of the process is required."""
        self._dead = True
        self.changed()

    def close(self) -> None:
        """Ends every Watch: a transport that closes would wait for them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def add_to(self, server: grpc.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(_Servicer(self), server)

    def status(self, service: str) -> int | None:
        """A HealthCheckResponse.ServingStatus, or None for an unknown service."""
        if service == _CATALOG:
            serving = self.alive
        elif service == _SERVER:
            serving = not self.unready_because
        elif service in self._known:
            serving = self._serves(service) and not self._dead
        else:
            return None
        status = health_pb2.HealthCheckResponse
        return int(status.SERVING if serving else status.NOT_SERVING)

    def changes(self, service: str, context: grpc.ServicerContext) -> Iterator[int]:
        """The status at once, and whenever it changes, until `context` ends."""
        sent: int | None = None

        def current() -> int:
            status = self.status(service)
            return int(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN) if status is None else status

        def over() -> bool:
            return self._closed or not context.is_active()

        def news() -> bool:
            return current() != sent or over()

        if not context.add_callback(self._wake):
            return
        while True:
            with self._changed:
                self._changed.wait_for(news)
                status = current()
            if status != sent:
                sent = status
                yield status
            elif over():
                return

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class _Servicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # generated, untyped
    def __init__(self, health: Health) -> None:
        self._health = health
        self._watches = threading.Semaphore(MAX_WATCHES)

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        status = self._health.status(request.service)
        if status is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        return health_pb2.HealthCheckResponse(status=status)

    def Watch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        if not self._watches.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHES} watches are open already: use Check")
        try:
            for status in self._health.changes(request.service, context):
                yield health_pb2.HealthCheckResponse(status=status)
        finally:
            self._watches.release()


def add_reflection(server: grpc.Server, services: tuple[str, ...]) -> None:
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
