"""/openapi.json: the routes that exist, as OpenAPI 3.1. Schemas come from the structures that check the bodies and from
the protobuf messages of the replies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

import msgspec
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rafaga.inference import open_inference_pb2 as pb
from rafaga.server.services.rest import ask, timeseries
from rafaga.server.services.rest.conversion import is_map, is_time
from rafaga.server.services.rest.open_inference import HEADER_LENGTH, Index, Inference
from rafaga.server.services.rest.timeseries import TimeSeriesRequest, TimeSeriesResponse
from rafaga.server.transport.http_calls import STATUS_OF, TIMEOUT_HEADER
from rafaga.v1 import catalog_pb2

PATH = "/openapi.json"

Schema = dict[str, Any]

_OPEN = {
    "/metrics": "Metrics in Prometheus' text format",
    "/healthz": "Whether the process is alive: 503 once a restart is required",
    "/readyz": "Whether every model is served; the body gives the reasons if not",
    "/v2/health/live": "Whether the process is alive",
    "/v2/health/ready": "Whether every model is served",
    PATH: "This description",
}
_OF_MODELS: dict[str, tuple[str, type[Message]]] = {
    "/v1/models": ("The models, their state and their properties", catalog_pb2.ListModelsResponse),
    "/v1/models/{name}": ("One model, with its labels", catalog_pb2.GetModelResponse),
    "/v2": ("Name, version and extensions of the server", pb.ServerMetadataResponse),
    "/v2/models/{name}": ("The inputs and outputs of a model", pb.ModelMetadataResponse),
    "/v2/models/{name}/ready": ("Whether a model is served", pb.ModelReadyResponse),
    "/v2/models/{name}/config": ("A model's configuration, as Triton describes it", pb.ModelConfig),
    "/v2/models/{name}/stats": ("Triton's statistics of a model", pb.ModelStatisticsResponse),
    "/v2/models/stats": ("Triton's statistics of every model", pb.ModelStatisticsResponse),
}
_NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32: "integer",
    FieldDescriptor.CPPTYPE_INT64: "integer",
    FieldDescriptor.CPPTYPE_UINT32: "integer",
    FieldDescriptor.CPPTYPE_UINT64: "integer",
    FieldDescriptor.CPPTYPE_DOUBLE: "number",
    FieldDescriptor.CPPTYPE_FLOAT: "number",
    FieldDescriptor.CPPTYPE_BOOL: "boolean",
}
_VERSION = "/versions/{version}"


def route(routes: Sequence[Route], version: str, *, secured: bool) -> Route:
    """Describes `routes` and itself. secured: calls need a bearer token."""
    content = msgspec.json.encode(_Document(version, secured).describe([each.path for each in routes] + [PATH]))

    async def openapi(_: Request) -> Response:
        return Response(content, media_type="application/json")

    return Route(PATH, openapi)


class _Document:
    def __init__(self, version: str, secured: bool) -> None:
        self._version = version
        self._secured = secured
        bodies: list[type[msgspec.Struct]] = [action.body for action in ask.ACTIONS.values()]
        bodies += [Inference, Index, TimeSeriesRequest, TimeSeriesResponse]
        self._bodies, self._schemas = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
        self._of_body = dict(zip(bodies, self._bodies, strict=True))

    def describe(self, paths: Iterable[str]) -> dict[str, Any]:
        found = {path: self._path(path) for path in paths}
        self._schemas["Error"] = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
        components: dict[str, Any] = {"schemas": self._schemas}
        if self._secured:
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        return {
            "openapi": "3.1.0",
            "info": {"title": "rafaga", "version": self._version},
            "paths": found,
            "components": components,
        }

    def _path(self, path: str) -> dict[str, Any]:
        bare = path.replace(_VERSION, "")
        if bare in _OPEN:
            media = "application/json" if bare.startswith("/v2") or bare == PATH else "text/plain"
            responses = {"200": {"description": "Yes, or the content", "content": {media: {}}}}
            if bare not in ("/metrics", PATH):
                responses["503"] = {"description": "No", "content": {media: {}}}
            return {"get": {"summary": _OPEN[bare], "responses": responses, "operationId": _identifier(path)}}
        verb, operation = self._operation(bare)
        named = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in _parameters(path)]
        timeout = {"name": TIMEOUT_HEADER, "in": "header", "schema": {"type": "string"}, "description": "250m, 2S"}
        operation["parameters"] = [*named, *operation.get("parameters", ()), timeout]
        error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for code in sorted({*STATUS_OF.values(), 413} - {499}):
            operation["responses"][str(code)] = {"description": "See the error", "content": error}
        if self._secured:
            operation["security"] = [{"token": []}]
        return {verb: operation | {"operationId": _identifier(path)}}

    def _operation(self, path: str) -> tuple[str, dict[str, Any]]:
        """Of a path without a version."""
        if path in _OF_MODELS:
            summary, reply = _OF_MODELS[path]
            return "get", {"summary": summary, "responses": _answer(self._message(reply))}
        if path == "/v2/repository/index":
            entry = self._message(pb.RepositoryIndexResponse.ModelIndex)
            body = {"content": {"application/json": {"schema": self._of_body[Index]}}}
            answer = _answer({"type": "array", "items": entry})
            return "post", {"summary": "The models and their state", "requestBody": body, "responses": answer}
        if path == timeseries.PATH:
            body = {"content": {"application/json": {"schema": self._of_body[TimeSeriesRequest]}}}
            answer = _answer(self._of_body[TimeSeriesResponse])
            return "post", {"summary": "Forecasts, in KServe's form", "requestBody": body, "responses": answer}
        if path.endswith("/infer"):
            return "post", self._inference()
        return "post", self._action(ask.ACTIONS[path.rpartition(":")[2]])

    def _inference(self) -> dict[str, Any]:
        binary: Schema = {"application/octet-stream": {}}
        answer = _answer(self._message(pb.ModelInferResponse))
        answer["200"]["content"] |= binary
        return {
            "summary": "An inference over tensors, in JSON or binary",
            "parameters": [{"name": HEADER_LENGTH, "in": "header", "schema": {"type": "integer"}}],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": self._of_body[Inference]}} | binary,
            },
            "responses": answer,
        }

    def _action(self, action: ask.Action) -> dict[str, Any]:
        (reference,) = self._of_body[action.body].values()
        properties = self._schemas[reference.rpartition("/")[2]]["properties"] | {"column": {"type": "string"}}
        return {
            "summary": action.summary,
            "parameters": [
                {"name": name, "in": "query", "schema": properties[name], "explode": False} for name in action.options
            ],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": self._of_body[action.body]}}
                | {media: {} for media in action.inputs},
            },
            "responses": _answer(self._message(action.reply)),
        }

    def _message(self, message: type[Message]) -> Schema:
        return self._described(cast("Descriptor", message.DESCRIPTOR))

    def _described(self, descriptor: Descriptor) -> Schema:
        name = descriptor.full_name
        if name not in self._schemas:
            self._schemas[name] = {}  # a message may hold itself
            special = _SPECIAL.get(name, {})
            properties = {f.name: self._field(f) for f in descriptor.fields} | special
            self._schemas[name] = {
                "type": "object",
                "properties": {name: schema for name, schema in properties.items() if schema is not None},
            }
        return {"$ref": f"#/components/schemas/{name}"}

    def _field(self, field: FieldDescriptor) -> Schema:
        if field.message_type is not None and is_map(field):
            return {"type": "object", "additionalProperties": self._one(field.message_type.fields_by_name["value"])}
        one = self._one(field)
        return {"type": "array", "items": one} if field.is_repeated else one

    def _one(self, field: FieldDescriptor) -> Schema:
        if field.message_type is not None:
            is_text = is_time(field.message_type)
            return {"type": "string", "format": "date-time"} if is_text else self._described(field.message_type)
        if field.enum_type is not None:
            return {"type": "string", "enum": [value.name for value in field.enum_type.values]}
        if field.type == FieldDescriptor.TYPE_BYTES:
            return {"type": "string", "contentEncoding": "base64"}
        return {"type": _NUMBERS.get(field.cpp_type, "string")}


_TENSOR: Schema = {
    "type": ["object", "null"],
    "properties": {
        "dtype": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "data": {"type": "string", "contentEncoding": "base64"},
    },
}
# Where the JSON differs from the message; None: the field is not there.
_SPECIAL: dict[str, dict[str, Schema | None]] = {
    "rafaga.v1.Segmentation": {"labels": _TENSOR, "probabilities": _TENSOR, "height": None, "width": None},
    "rafaga.v1.FeatureMap": {"dtype": {"type": "string"}},
    "inference.ModelInferResponse": {"raw_output_contents": None, "parameters": None},
    "inference.ModelInferResponse.InferOutputTensor": {
        "contents": None,
        "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer"}}},
        "data": {"type": "array"},
    },
}


def _answer(schema: Schema) -> dict[str, Any]:
    return {"200": {"description": "The answer", "content": {"application/json": {"schema": schema}}}}


def _parameters(path: str) -> list[str]:
    return re.findall(r"{(\w+)}", path)


def _identifier(path: str) -> str:
    return re.sub(r"\W+", "_", path).strip("_")
