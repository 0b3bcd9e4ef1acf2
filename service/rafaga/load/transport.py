"""Requests over gRPC: raw bytes on several connections, with asyncio, which has the lowest cost per call in one
process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
import grpc.aio

from rafaga.client import _calls
from rafaga.client._channel import Endpoint
from rafaga.errors import RafagaError, ServerUnreachable
from rafaga.load.codecs import reader
from rafaga.load.codecs.base import Target
from rafaga.load.generator import CallFailed
from rafaga.load.log import Reply


class GrpcSend:
    """Sends the requests of a mix, which are numbered through from the first target's first. Needs a running loop.

    channels: more than one, because a single connection would measure HTTP/2's flow control. check_every: compares one
    of this many answers to a request with the reference; 0 compares none.
    """

    def __init__(self, endpoint: Endpoint, targets: Sequence[Target], channels: int, check_every: int) -> None:
        self._endpoint = endpoint
        self._check_every = check_every
        self._channels = [self._open() for _ in range(channels)]
        self._requests: list[bytes] = []
        self._references: list[bytes | None] = []
        self._calls: list[list[grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]]] = []
        self._readers = []
        for target in targets:
            calls: list[grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]] = [
                channel.unary_unary(target.method, None, None) for channel in self._channels
            ]
            read = reader(target.replies)
            for request in target.requests:
                self._requests.append(request.body)
                self._references.append(request.reference)
                self._calls.append(calls)
                self._readers.append(read)
        self._turn = 0

    def _open(self) -> grpc.aio.Channel:
        point = self._endpoint
        if point.credentials is None:
            return grpc.aio.insecure_channel(point.target, point.options)
        return grpc.aio.secure_channel(point.target, point.credentials, point.options)

    async def connect(self, timeout_s: float) -> None:
        """Opens every connection before the clock runs. Raises ServerUnreachable."""
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(channel.channel_ready() for channel in self._channels))
        except TimeoutError:
            raise ServerUnreachable(f"{self._endpoint.address}: no connection within {timeout_s:g} s") from None

    async def __call__(self, request: int, timeout_s: float) -> Reply:
        turn = self._turn = self._turn + 1
        calls = self._calls[request]
        try:
            reply = await calls[turn % len(calls)](
                self._requests[request], timeout=timeout_s, metadata=self._endpoint.metadata
            )
        except grpc.aio.AioRpcError as error:
            raise CallFailed(_reason(_calls.error_from(error, "", timeout_s), error.code())) from None
        read, reference = self._readers[request], self._references[request]
        answer = read.timing(reply)
        if reference is not None and self._check_every and turn % self._check_every == 0:
            return answer._replace(right=read.same(reply, reference))
        return answer

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close(None)


def _reason(error: RafagaError, code: grpc.StatusCode) -> str:
    """The reason that came with the status. For servers that send none: that of the error class, or the name of the
    status."""
    return error.reason if type(error) is not RafagaError else code.name
