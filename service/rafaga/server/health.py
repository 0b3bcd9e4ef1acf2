"""grpc.health.v1: "" for the server, the name of a model for that model. Served by grpcio's own servicer."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

_SERVER = ""


class Health:
    """Starts as NOT_SERVING, for the server and for every model."""

    def __init__(self) -> None:
        # Non-blocking: a Watch holds no thread.
        self._servicer = health.HealthServicer(experimental_non_blocking=True)
        self.server(ready=False)

    def server(self, *, ready: bool) -> None:
        self._set(_SERVER, ready)

    def model(self, name: str, ready: bool) -> None:
        self._set(name, ready)

    def drain(self) -> None:
        """Everything is NOT_SERVING from now on, whatever is set later."""
        self._servicer.enter_graceful_shutdown()

    def add_to(self, server: grpc.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    def _set(self, service: str, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse
        self._servicer.set(service, status.SERVING if ready else status.NOT_SERVING)


def add_reflection(server: grpc.Server, services: tuple[str, ...]) -> None:
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
