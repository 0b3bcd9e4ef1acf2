"""Calls served through grpcio's public API alone: each holds a thread of the pool from its arrival to its reply.

For the admin listener, whose handlers block, and for versions of grpcio that `completion_queue` does not know.
"""

from __future__ import annotations

import math
import threading
import time
from typing import NoReturn, cast

import grpc

from rafaga.errors import Status
from rafaga.server.transport.router import Call, Metadata, Router


def add_to(server: grpc.Server, router: Router) -> None:
    """Adds the methods of `router`."""
    services: dict[str, dict[str, grpc.RpcMethodHandler[bytes, bytes]]] = {}
    for path in router.methods:
        _, service, name = path.split("/")
        services.setdefault(service, {})[name] = _handler(router, path)
    for service, handlers in services.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


def abort(context: grpc.ServicerContext, status: Status) -> NoReturn:
    """Ends a call that grpcio serves with `status`."""
    context.set_trailing_metadata(status.trailing_metadata)
    context.abort(status.code, status.message)


def _handler(router: Router, path: str) -> grpc.RpcMethodHandler[bytes, bytes]:
    def serve(request: bytes, context: grpc.ServicerContext) -> bytes:
        call = _BlockingCall(path, request, context)
        router.handle(call)
        # Only now: a call must be booked before it can be cancelled. grpcio runs the callback at the end of every call;
        # after a reply or a failure, cancel does nothing.
        if not context.add_callback(call.cancel):
            call.cancel()
        return call.wait()

    return grpc.unary_unary_rpc_method_handler(serve)


class _BlockingCall(Call):
    def __init__(self, method: str, request: bytes, context: grpc.ServicerContext) -> None:
        remaining = context.time_remaining()
        deadline = math.inf if remaining is None else time.monotonic() + remaining
        metadata = cast("Metadata", context.invocation_metadata())  # named pairs
        super().__init__(method, metadata, request, deadline)
        self._context = context
        self._payload = b""
        self._status: Status | None = None
        self._answered = threading.Lock()
        self._answered.acquire()

    def wait(self) -> bytes:
        """Blocks until the call is finished; gives the reply or ends the call with its status."""
        self._answered.acquire()
        if self._status is not None:
            abort(self._context, self._status)
        return self._payload

    def _send(self, payload: bytes) -> None:
        self._payload = payload
        self._answered.release()

    def _send_failure(self, status: Status) -> None:
        self._status = status
        self._answered.release()

    def _release(self) -> None:
        self._answered.release()
