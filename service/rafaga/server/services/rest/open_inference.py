"""/v2: the Open Inference Protocol over HTTP, with JSON tensors and Triton's extension for binary ones.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from google.protobuf.message import Message
from msgspec import Meta, Raw, Struct, field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rafaga.errors import InvalidRequest, InvalidTensor, quoted
from rafaga.inference import open_inference_pb2 as pb
from rafaga.server.services.open_inference.stream import INFER, SERVICE
from rafaga.server.services.rest import tensors
from rafaga.server.services.rest.conversion import decoded, plain
from rafaga.server.transport.http_calls import HttpCalls, json_response

HEADER_LENGTH = "Inference-Header-Content-Length"

_Size = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Parameters = dict[str, bool | int | float | str]


class Input(Struct):
    name: str
    datatype: str
    shape: list[_Size]
    parameters: _Parameters | None = None
    data: Raw = field(default_factory=Raw)


class Output(Struct):
    name: str
    parameters: _Parameters | None = None


class Inference(Struct):
    inputs: list[Input]
    id: str = ""
    parameters: _Parameters | None = None
    outputs: list[Output] | None = None


class Index(Struct):
    ready: bool = False


def routes(calls: HttpCalls) -> list[Route]:
    # Those whose requests only name a model, and perhaps a version.
    statistics = _as_json(pb.ModelStatisticsResponse)
    about: tuple[tuple[str, str, type[Message], Callable[[bytes], Response]], ...] = (
        ("", "ModelMetadata", pb.ModelMetadataRequest, _as_json(pb.ModelMetadataResponse)),
        ("/ready", "ModelReady", pb.ModelReadyRequest, _model_ready),
        ("/config", "ModelConfig", pb.ModelConfigRequest, _config),
        ("/stats", "ModelStatistics", pb.ModelStatisticsRequest, statistics),
    )
    server = _as_json(pb.ServerMetadataResponse)
    found = [
        Route("/v2", partial(_ask, calls, "ServerMetadata", pb.ServerMetadataRequest, server)),
        Route("/v2/models/stats", partial(_ask, calls, "ModelStatistics", pb.ModelStatisticsRequest, statistics)),
        Route("/v2/repository/index", partial(_index, calls), methods=["POST"]),
    ]
    for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        found += [
            Route(f"{model}{path}", partial(_ask, calls, method, message, render))
            for path, method, message, render in about
        ]
        found.append(Route(f"{model}/infer", partial(_infer, calls), methods=["POST"]))
    return found


async def _ask(
    calls: HttpCalls,
    method: str,
    message: type[Message],
    render: Callable[[bytes], Response],
    request: Request,
) -> Response:
    return await calls.serve(request, f"/{SERVICE}/{method}", lambda _: message(**request.path_params), render)


async def _index(calls: HttpCalls, request: Request) -> Response:
    return await calls.serve(
        request,
        f"/{SERVICE}/RepositoryIndex",
        lambda body: pb.RepositoryIndexRequest(ready=decoded(body, Index).ready if body else False),
        lambda payload: json_response(plain(pb.RepositoryIndexResponse.FromString(payload))["models"]),
    )


async def _infer(calls: HttpCalls, request: Request) -> Response:
    inference = _Inference(request.path_params, request.headers.get(HEADER_LENGTH))
    return await calls.serve(request, INFER, inference.translate, inference.render)


def _as_json(message: type[Message]) -> Callable[[bytes], Response]:
    return lambda payload: json_response(plain(message.FromString(payload)))


def _model_ready(payload: bytes) -> Response:
    ready = pb.ModelReadyResponse.FromString(payload).ready
    return json_response({"ready": True}) if ready else json_response({"ready": False, "error": "not ready"}, 503)


def _config(payload: bytes) -> Response:
    return json_response(plain(pb.ModelConfigResponse.FromString(payload).config))


class _Inference:
    """One inference: what its request says about the reply is needed when the reply is there."""

    def __init__(self, path: Mapping[str, str], header_length: str | None) -> None:
        self._path = path
        self._header_length = header_length
        self._binary: dict[str, bool] = {}  # by output
        self._all_binary = False

    def translate(self, body: bytes) -> pb.ModelInferRequest:
        """Raises InvalidRequest."""
        length = self._json_length(body)
        given = decoded(memoryview(body)[:length], Inference)
        parameters = given.parameters or {}
        self._all_binary = parameters.pop("binary_data_output", False) is True
        for output in given.outputs or ():
            binary = (output.parameters or {}).pop("binary_data", self._all_binary)
            self._binary[output.name] = binary is True
        try:
            request = pb.ModelInferRequest(
                model_name=self._path["name"],
                model_version=self._path.get("version", ""),
                id=given.id,
                raw_input_contents=_contents(given.inputs, body, length),
                inputs=[
                    pb.ModelInferRequest.InferInputTensor(
                        name=each.name,
                        datatype=each.datatype,
                        shape=each.shape,
                        parameters=_parameters(each.parameters),
                    )
                    for each in given.inputs
                ],
                outputs=[
                    pb.ModelInferRequest.InferRequestedOutputTensor(
                        name=each.name, parameters=_parameters(each.parameters)
                    )
                    for each in given.outputs or ()
                ],
                parameters=_parameters(parameters),
            )
        except ValueError as error:  # a lone surrogate, or an integer of more than 64 bits
            raise InvalidRequest(f"expected text in UTF-8 and integers of at most 64 bits: {error}"[:300]) from None
        return request

    def render(self, payload: bytes) -> Response:
        reply = pb.ModelInferResponse.FromString(payload)
        described, binary = [], []
        for output, raw in zip(reply.outputs, reply.raw_output_contents, strict=True):
            one: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
            if self._binary.get(output.name, self._all_binary):
                one["parameters"] = {"binary_data_size": len(raw)}
                binary.append(raw)
            else:
                one["data"] = tensors.values(output.datatype, raw)
            described.append(one)
        head: dict[str, Any] = {"model_name": reply.model_name, "model_version": reply.model_version}
        if reply.id:
            head["id"] = reply.id
        response = json_response(head | {"outputs": described})
        if not binary:
            return response
        length = {HEADER_LENGTH: str(len(response.body))}
        return Response(b"".join([bytes(response.body), *binary]), 200, length, "application/octet-stream")

    def _json_length(self, body: bytes) -> int:
        text = self._header_length
        if text is None:
            return len(body)
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and 0 < int(text) <= len(body)):
            raise InvalidRequest(
                f"header {HEADER_LENGTH}: expected the length of the JSON, at most the {len(body)} bytes of the body; "
                f"got {quoted(text, 30)}"
            )
        return int(text)


def _contents(inputs: Sequence[Input], body: bytes, at: int) -> list[bytes]:
    """The raw contents of each input, from its `data` or from the bytes of `body` that follow the JSON at `at`."""
    found = []
    for each in inputs:
        where = f"input {quoted(each.name)}"
        given = each.parameters or {}
        size = given.pop("binary_data_size", None)
        data = memoryview(each.data)
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(body) - at:
                raise InvalidTensor(
                    f"{where}: expected a binary_data_size of at most {len(body) - at} bytes, which follow; got {size}"
                )
            if data.nbytes:
                raise InvalidTensor(f"{where}: expected either data or binary_data_size, got both")
            found.append(body[at : at + size])
            at += size
        elif data.nbytes:
            try:
                found.append(tensors.raw_contents(each.datatype, each.shape, data))
            except InvalidRequest as error:
                raise InvalidTensor(f"{where}: {error.message}") from None
        elif "shared_memory_region" in given:
            found.append(b"")  # the service refuses it
        else:
            raise InvalidTensor(f"{where}: expected data, or the parameter binary_data_size")
    if at != len(body):
        raise InvalidTensor(f"expected {at} bytes, the JSON and the binary tensors; got {len(body)}")
    return found


def _parameters(given: _Parameters | None) -> dict[str, pb.InferParameter]:
    return {name: _parameter(value) for name, value in (given or {}).items()}


def _parameter(value: bool | int | float | str) -> pb.InferParameter:
    if isinstance(value, bool):
        return pb.InferParameter(bool_param=value)
    if isinstance(value, int):
        return pb.InferParameter(int64_param=value)
    return pb.InferParameter(string_param=value) if isinstance(value, str) else pb.InferParameter(double_param=value)
