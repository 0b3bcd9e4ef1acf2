"""/v1/models: the catalogue, and one action per task. The body is JSON, or what the task is about: an image or text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, Literal, Self

import msgspec
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from msgspec import Meta, Struct
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rafaga.errors import InvalidRequest, listed, quoted
from rafaga.server.services.rest.conversion import Count, decoded, plain, text_of
from rafaga.server.services.rest.forecast import Forecast
from rafaga.server.services.submission import version_number
from rafaga.server.transport.http_calls import HttpCalls, json_response
from rafaga.v1 import catalog_pb2, sequences_pb2, vision_pb2


class Tensor(Struct, forbid_unknown_fields=True):
    """`data`: row-major, in base64."""

    shape: Annotated[list[Count], Meta(min_length=4, max_length=4, description="[N, height, width, channels]")]
    data: bytes
    dtype: Literal["uint8"] = "uint8"


class _Images(Struct, forbid_unknown_fields=True):
    images: Annotated[list[bytes], Meta(description="JPEG, PNG, WebP, GIF or BMP files")] = []
    pixels: Tensor | None = None

    @classmethod
    def of_raw(cls, body: bytes, _: Mapping[str, str]) -> Self:
        return cls(images=[body])

    @property
    def given(self) -> dict[str, object]:
        """The input as the fields of a request."""
        if self.images and self.pixels is not None:
            raise InvalidRequest("expected either `images` or `pixels`, got both")
        if self.pixels is not None:
            sizes = zip(("batch", "height", "width", "channels"), self.pixels.shape, strict=True)
            return {"pixels": vision_pb2.ImageTensor(data=self.pixels.data, **dict(sizes))}
        if not self.images:
            raise InvalidRequest("expected an image as the body, or JSON with `images` or `pixels`")
        return {"encoded": vision_pb2.EncodedImages(images=self.images)}


class Classify(_Images):
    top_k: Count = 0
    min_probability: float = 0.0


class Detect(_Images):
    min_score: float = 0.0
    max_objects: Count = 0


class Segment(_Images):
    with_probabilities: bool = False


class Features(_Images):
    pass


class Predict(Struct, forbid_unknown_fields=True):
    symbols: list[str] = []
    sequences: list[list[str]] = []
    top_k: Count = 0

    @classmethod
    def of_raw(cls, body: bytes, _: Mapping[str, str]) -> Self:
        """One word is a symbol per character, several are one symbol each."""
        words = [word for word in re.split(r"[\s,]+", text_of(body)) if word]
        return cls(symbols=list(words[0]) if len(words) == 1 else words)

    @property
    def given(self) -> dict[str, object]:
        return {
            "symbols": self.symbols,
            "sequences": [sequences_pb2.Sequence(symbols=symbols) for symbols in self.sequences],
        }


Body = Classify | Detect | Segment | Features | Forecast | Predict
_INPUTS = {"images", "pixels", "history", "series", "symbols", "sequences"}


@dataclass(frozen=True)
class Action:
    """name: of the method, in rafaga.v1. inputs: what the body may be besides JSON."""

    name: str
    body: type[Body]
    inputs: tuple[str, ...]
    summary: str
    convert: Callable[[Any], dict[str, Any]] = plain

    @property
    def method(self) -> str:
        return "/rafaga.v1." + self.name.replace(".", "/")

    @cached_property
    def request(self) -> type[Message]:
        return GetMessageClass(self._described.input_type)

    @cached_property
    def reply(self) -> type[Message]:
        return GetMessageClass(self._described.output_type)

    @property
    def _described(self) -> MethodDescriptor:
        return descriptor_pool.Default().FindMethodByName(f"rafaga.v1.{self.name}")

    @property
    def options(self) -> list[str]:
        """The fields that may also be query parameters."""
        own = [name for name in self.body.__struct_fields__ if name not in _INPUTS]
        return [*own, "column"] if self.body is Forecast else own


def _labels_or_values(reply: vision_pb2.ClassifyResponse) -> dict[str, Any]:
    found = plain(reply)
    for result in found["results"]:
        del result["labels" if result["values"] else "values"]
    return found


def _with_maps(reply: vision_pb2.SegmentResponse) -> dict[str, Any]:
    found = plain(reply)
    for result in found["results"]:
        shape = [result.pop("height"), result.pop("width")]
        for name, dtype in (("labels", "uint8"), ("probabilities", "float32")):
            result[name] = {"dtype": dtype, "shape": shape, "data": result[name]} if result[name] else None
    return found


def _with_dtypes(reply: vision_pb2.ExtractFeaturesResponse) -> dict[str, Any]:
    found = plain(reply)
    for each in found["maps"]:
        each["dtype"] = "float32"
    return found


_FILES = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp")
_CSV, _TEXT = ("text/csv",), ("text/plain",)
ACTIONS = {
    "classify": Action(
        "Vision.Classify",
        Classify,
        _FILES,
        "The most probable labels of each image, or the values of a regression model",
        _labels_or_values,
    ),
    "detect": Action("Vision.Detect", Detect, _FILES, "The objects in each image, with their boxes"),
    "segment": Action("Vision.Segment", Segment, _FILES, "The class of every pixel of each image", _with_maps),
    "features": Action(
        "Vision.ExtractFeatures", Features, _FILES, "Feature maps or embeddings of each image", _with_dtypes
    ),
    "forecast": Action("Forecasting.Forecast", Forecast, _CSV, "Quantiles for every step of the horizon"),
    "predict": Action("Sequences.Predict", Predict, _TEXT, "The most probable next symbols"),
}


def routes(calls: HttpCalls) -> list[Route]:
    model = "/v1/models/{name}"
    found = [
        Route("/v1/models", partial(_list_models, calls)),
        Route(model, partial(_get_model, calls)),
        Route(f"{model}/versions/{{version}}", partial(_get_model, calls)),
    ]
    # An action first: `{name}` would match its colon too.
    for name, action in ACTIONS.items():
        for path in (f"{model}:{name}", f"{model}/versions/{{version}}:{name}"):
            found.insert(0, Route(path, partial(_ask, calls, action), methods=["POST"]))
    return found


async def _list_models(calls: HttpCalls, request: Request) -> Response:
    return await calls.serve(
        request,
        "/rafaga.v1.Catalog/ListModels",
        lambda _: catalog_pb2.ListModelsRequest(),
        lambda payload: json_response(plain(catalog_pb2.ListModelsResponse.FromString(payload))),
    )


async def _get_model(calls: HttpCalls, request: Request) -> Response:
    if ":" in request.path_params["name"]:
        raise HTTPException(405, headers={"Allow": "POST"})  # of an action
    return await calls.serve(
        request,
        "/rafaga.v1.Catalog/GetModel",
        lambda _: catalog_pb2.GetModelRequest(name=request.path_params["name"], version=_version(request)),
        lambda payload: json_response(plain(catalog_pb2.GetModelResponse.FromString(payload))),
    )


async def _ask(calls: HttpCalls, action: Action, request: Request) -> Response:
    def translate(content: bytes) -> Message:
        body = _body(action, request, content)
        options = {name: getattr(body, name) for name in body.__struct_fields__ if name not in _INPUTS}
        names = {"model": request.path_params["name"], "version": _version(request)}
        return action.request(**names, **body.given, **options)

    def render(payload: bytes) -> Response:
        return json_response(action.convert(action.reply.FromString(payload)))

    return await calls.serve(request, action.method, translate, render)


def _body(action: Action, request: Request, content: bytes) -> Body:
    """Raises InvalidRequest."""
    query = dict(request.query_params)
    if unknown := query.keys() - set(action.options):
        known = listed(action.options) or "none"
        raise InvalidRequest(f"query parameters: expected {known}; got {listed(map(quoted, sorted(unknown)))}")
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise InvalidRequest("expected the file itself as the body (curl --data-binary @FILE), got a form")
    if content.lstrip()[:1] == b"{":
        body = decoded(content, action.body)
    else:
        body = action.body.of_raw(content, query)
    query.pop("column", None)
    lists = {name: text.split(",") if name == "quantiles" else text for name, text in query.items()}
    try:
        given = msgspec.convert(lists, action.body, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"query parameters: {error}") from None
    for name in query:
        setattr(body, name, getattr(given, name))
    return body


def _version(request: Request) -> int:
    return version_number(request.path_params.get("version", ""))
