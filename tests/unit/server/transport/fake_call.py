"""A call without a socket, and a router around one handler."""

from __future__ import annotations

import hashlib
import math

import grpc

from rafaga.errors import RafagaError, Status
from rafaga.server.observability.metrics import Metrics
from rafaga.server.transport.router import Authenticator, Call, Handler, InFlight, Metadata, Router

METHOD = "/rafaga.v1.Vision/Classify"
WAIT_S = 30.0


class FakeCall(Call):
    """Remembers what was sent."""

    def __init__(
        self, request: bytes = b"", metadata: Metadata = (), deadline: float = math.inf, method: str = METHOD
    ) -> None:
        super().__init__(method, metadata, request, deadline)
        self.sent: list[bytes | Status] = []
        self.released = 0

    def _send(self, payload: bytes) -> None:
        self.sent.append(payload)

    def _send_failure(self, status: Status) -> None:
        self.sent.append(status)

    def _release(self) -> None:
        self.released += 1

    @property
    def code(self) -> grpc.StatusCode:
        (sent,) = self.sent
        return grpc.StatusCode.OK if isinstance(sent, bytes) else sent.code


class Bench:
    """A router around one handler."""

    def __init__(self, handler: Handler, *, tokens: tuple[str, ...] = (), most: int = 10, limit: int = 100) -> None:
        self.metrics = Metrics()
        hashes = [hashlib.sha256(token.encode()).hexdigest() for token in tokens]
        self.settled: list[tuple[Call, RafagaError | None]] = []
        self.router = Router(
            {METHOD: handler},
            Authenticator(hashes),
            self.metrics,
            limit,
            InFlight(most),
            lambda call, error, _: self.settled.append((call, error)),
        )

    def ask(self, *about: object, **more: object) -> FakeCall:
        call = FakeCall(*about, **more)  # type: ignore[arg-type]
        self.router.handle(call)
        return call

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"method": METHOD, **labels}) or 0.0
