"""Calls over HTTP: a request becomes a `Call` of a gRPC method, and takes the way of all calls through the Router.

head of the request  →  Router.admit  →  its body  →  translate  →  Router.dispatch  →  …  →  render  →  response
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import grpc
import msgspec
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response

from rafaga.errors import (
    Draining,
    InvalidRequest,
    QueueFull,
    Refused,
    RequestTooLarge,
    Status,
    Unauthenticated,
    from_status,
    quoted,
)
from rafaga.server.transport.router import Call, Metadata, Router

T = TypeVar("T")

TIMEOUT_HEADER = "grpc-timeout"
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

STATUS_OF = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,  # 413 if the request is too large: see `error_response`
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_TOO_LARGE = 413

# Bodies from this size on are translated in a thread: the event loop must go on. One thread, because Python runs one
# at a time anyway, and because JSON takes many times its size while it is translated.
_LARGE_BYTES = 64 * 1024

_RETRY_AFTER_S = 0.1


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def error_response(status: Status) -> Response:
    error = from_status(*status)
    code = _TOO_LARGE if isinstance(error, RequestTooLarge) else STATUS_OF.get(error.code, 500)
    headers = {}
    if code in (429, 503):
        after_s = error.retry_after_s if isinstance(error, Refused) else None
        headers["Retry-After"] = str(max(1, math.ceil(after_s or 0.0)))
    if code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Draining):
        headers["Connection"] = "close"  # the next connection leads to another replica
    return json_response({"error": error.message}, code, headers)


class HttpCall(Call):
    """Made in the event loop's thread, and answered from any thread. outcome: the reply, or how the call failed."""

    def __init__(self, method: str, metadata: Metadata) -> None:
        super().__init__(method, metadata)
        self._loop = asyncio.get_running_loop()
        self.outcome: asyncio.Future[bytes | Status] = self._loop.create_future()

    def _send(self, payload: bytes) -> None:
        self._wake(payload)

    def _send_failure(self, status: Status) -> None:
        self._wake(status)

    def _wake(self, outcome: bytes | Status) -> None:
        with contextlib.suppress(RuntimeError):  # the server has closed the loop
            self._loop.call_soon_threadsafe(self._set, outcome)

    def _set(self, outcome: bytes | Status) -> None:
        if not self.outcome.cancelled():
            self.outcome.set_result(outcome)


class HttpCalls:
    """Sends HTTP requests through `router`.

    max_receiving_bytes: of all bodies that are not dispatched yet. certificates: callers must have presented a client
    certificate.
    """

    def __init__(
        self, router: Router, max_request_bytes: int, max_receiving_bytes: int, *, certificates: bool = False
    ) -> None:
        self._router = router
        self._max_request_bytes = max_request_bytes
        self._max_receiving_bytes = max_receiving_bytes
        self._certificates = certificates
        self._receiving_bytes = 0

    async def serve(
        self,
        request: Request,
        method: str,
        translate: Callable[[bytes], Message],
        render: Callable[[bytes], Response],
    ) -> Response:
        """Calls `method` with what `translate` makes of the body, and answers with what `render` makes of the reply.

        `translate` may raise RafagaError.
        """
        call = HttpCall(method, request.headers.items())
        try:
            if self._router.admit(call):
                call.deadline = call.received + self._timeout_s(request)
                async with asyncio.timeout_at(None if call.deadline == math.inf else call.deadline):
                    await self._dispatch(call, request, translate)
                    if not await _finished(call, request):
                        call.cancel()
                        return Response(status_code=STATUS_OF[grpc.StatusCode.CANCELLED])  # the client has gone
        except TimeoutError:
            call.expire()
        except Exception as error:
            call.fail_with(error)
        outcome = await call.outcome
        if isinstance(outcome, Status):
            return error_response(outcome)
        return await _off_loop(len(outcome), lambda: render(outcome))

    def _timeout_s(self, request: Request) -> float:
        """Infinity without the header. Raises InvalidRequest, or Unauthenticated without a certificate that must be."""
        if self._certificates and not request.state.certified:
            raise Unauthenticated("expected a client certificate that the server's authority has signed")
        text = request.headers.get(TIMEOUT_HEADER)
        if text is None:
            return math.inf
        if (found := _TIMEOUT.fullmatch(text)) is None:
            raise InvalidRequest(
                f"header {TIMEOUT_HEADER}: expected at most 8 digits and H, M, S, m, u or n, got {quoted(text, 30)}"
            )
        return int(found[1]) * _UNITS[found[2]]

    async def _dispatch(self, call: HttpCall, request: Request, translate: Callable[[bytes], Message]) -> None:
        """Leaves the call as it is if the client disconnects."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise InvalidRequest("expected no content-encoding: a compressed body can inflate a thousandfold")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_request_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size, more = 0, True
        try:
            while more:
                event = await request.receive()
                if event["type"] == "http.disconnect":
                    return
                chunks.append(event["body"])
                more = event["more_body"]
                size += len(event["body"])
                self._receiving_bytes += len(event["body"])
                if size > self._max_request_bytes:
                    raise self._too_large()
                if self._receiving_bytes > self._max_receiving_bytes:
                    raise QueueFull("too many bytes of requests are on their way: retry later", _RETRY_AFTER_S)
            body = b"".join(chunks)
            chunks.clear()
            call.request = await _off_loop(size, lambda: translate(body).SerializeToString())
            self._router.dispatch(call)
        finally:
            self._receiving_bytes -= size

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(f"expected a request of at most {self._max_request_bytes} bytes, got more: split it")


async def _finished(call: HttpCall, request: Request) -> bool:
    """Waits for the outcome. False if the client disconnects first."""
    if call.outcome.done():
        return True
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((call.outcome, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
    return call.outcome.done()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _off_loop(size: int, work: Callable[[], T]) -> T:
    """The result of `work`, which takes time in proportion to `size` bytes."""
    if size < _LARGE_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)
