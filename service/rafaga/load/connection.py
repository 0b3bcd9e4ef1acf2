"""The server under load as an address and credentials: what every process of the generator connects with."""

from __future__ import annotations

import re
import socket
from collections import Counter
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

    def addresses(self) -> int:
        """How many addresses share the calls: those of a list, or those that a name behind `dns:` resolves to now; 1 if
        only gRPC can resolve it. Raises ValueError or OSError as `endpoint` does."""
        target = self.endpoint().target
        if target.startswith(("ipv4:", "ipv6:")):
            return target.count(",") + 1
        if not target.startswith("dns:"):
            return 1
        name = re.sub(r":\d+$", "", target.rpartition("/")[2].removeprefix("dns:")).strip("[]")
        try:
            found = {(family, where[0]) for family, _, _, _, where in socket.getaddrinfo(name, None)}
        except OSError:
            return 1
        # One machine often has an address of each version.
        return max(Counter(family for family, _ in found).values())

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
