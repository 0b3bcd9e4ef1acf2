"""Checks of the calls that grpcio itself serves: health, reflection, streams, and unary calls of its public API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from rafaga.errors import InvalidRequest, RafagaError, to_status
from rafaga.server.transport import blocking
from rafaga.server.transport.router import Authenticator

# Probes of orchestrators carry no token, and health shows only up or down.
_OPEN_SERVICE = "/grpc.health.v1.Health/"

# A handler that only refuses is streaming, whatever the method is: grpcio reads a unary request before it calls.
_stream = grpc.stream_stream_rpc_method_handler


class TokenCheck(grpc.ServerInterceptor):
    """Asks for the token before the request is read: a caller without one cannot make the server buffer or wait."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if not handler_call_details.method.startswith(_OPEN_SERVICE):
            metadata = tuple((key, value) for key, value in handler_call_details.invocation_metadata)
            if (error := self._authenticator.refusal(metadata)) is not None:
                return _stream(lambda _, context: _refuse(context, error))
        return continuation(handler_call_details)


class RequestCheck(grpc.ServerInterceptor):
    """Answers a request that does not parse with INVALID_ARGUMENT. grpcio answers INTERNAL, and logs a traceback."""

    def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:  # the handler parses its requests
            return handler

        def parse(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except DecodeError:
                return InvalidRequest(f"{handler_call_details.method}: the request is not a message of this method")

        def checked(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            for request in requests:
                if isinstance(request, InvalidRequest):
                    _refuse(context, request)
                yield request

        def one(request: Any, context: grpc.ServicerContext) -> Any:
            return next(checked(iter((request,)), context))

        serialize = handler.response_serializer
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                lambda request, context: handler.unary_unary(one(request, context), context), parse, serialize
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                lambda request, context: handler.unary_stream(one(request, context), context), parse, serialize
            )
        return _stream(
            lambda requests, context: handler.stream_stream(checked(requests, context), context), parse, serialize
        )


def _refuse(context: grpc.ServicerContext, error: RafagaError) -> NoReturn:
    blocking.abort(context, to_status(error))
