"""The server under load as an address and credentials: what every process of the generator connects with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc

from rafaga.client import Tls, _calls
from rafaga.client._channel import Endpoint, endpoint
from rafaga.priority import Priority

Ask: TypeAlias = Callable[[str, bytes], bytes]
"""A method and a serialised request to a serialised reply. Raises RafagaError."""


@dataclass(frozen=True)
class Connection:
    address: str
    token: str | None = field(default=None, repr=False)
    tls: Tls | None = None
    priority: Priority = Priority.NORMAL

    def endpoint(self) -> Endpoint:
        """Raises ValueError for an address that cannot be one, OSError for a name that does not resolve."""
        return endpoint(self.address, tls=self.tls, token=self.token, priority=self.priority)

    @contextmanager
    def ask(self, timeout_s: float) -> Iterator[Ask]:
        """One call after another, for what has to be known before the load begins."""
        point = self.endpoint()
        channel = (
            grpc.insecure_channel(point.target, point.options)
            if point.credentials is None
            else grpc.secure_channel(point.target, point.credentials, point.options)
        )

        def ask(method: str, request: bytes) -> bytes:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                method, request_serializer=None, response_deserializer=None
            )
            try:
                reply: bytes = call(request, timeout=timeout_s, metadata=point.metadata)
            except grpc.RpcError as error:
                raise _calls.error_from(error, self.address, timeout_s) from None
            return reply

        with channel:
            yield ask
