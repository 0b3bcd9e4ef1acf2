"""The calls of the API as values: method, serialised request, parsing of the reply, meaning of errors.

Both clients run these; neither knows a protobuf message. Requests are serialised once, however often they are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
import numpy.typing as npt
from google.protobuf.message import DecodeError

from rafaga.addresses import GRPC_PORT
from rafaga.client import _forecast, _history, _images, _models, _objects, _results
from rafaga.client._forecast import Forecast
from rafaga.client._frames import SymbolsInput, column
from rafaga.client._history import Asked, SeriesInput
from rafaga.client._images import Prepared
from rafaga.client._models import ModelDescription, ModelState
from rafaga.client._objects import Detections, Segmentation
from rafaga.client._results import Classification, Continuation, Features
from rafaga.errors import (
    STATUS_DETAILS_KEY,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ModelNotReady,
    RafagaError,
    ServerUnreachable,
    from_status,
)
from rafaga.v1 import catalog_pb2, forecasting_pb2, sequences_pb2, vision_pb2

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

# How gRPC's long message says why there is no connection → what users read.
_NOT_THERE = {
    "Connection refused": "connection refused",
    "No such file or directory": "no such socket",
    "Domain name not found": "unknown host name",
    "DNS resolution failed": "unknown host name",
    "No route to host": "no route to host",
    "Failed parsing HTTP/2": f"that port does not speak gRPC; its default is {GRPC_PORT}",
    "WRONG_VERSION_NUMBER": "that port does not use TLS",
}


@dataclass(frozen=True)
class UnaryCall(Generic[T_co]):
    """One unary call. `read` raises errors that the reply itself reports; a Refused from it is retried like any
    other."""

    method: str
    request: bytes
    read: Callable[[bytes], T_co]


def first(call: UnaryCall[list[T]]) -> UnaryCall[T]:
    """Of a call with one input."""
    return UnaryCall(call.method, call.request, lambda reply: call.read(reply)[0])


def classify(
    images: Sequence[_images.Content], *, model: str, version: int | None, top_k: int | None, min_probability: float
) -> UnaryCall[list[Classification]]:
    most, least = 0 if top_k is None else _positive("top_k", top_k), _share("min_probability", min_probability)
    request = vision_pb2.ClassifyRequest(model=_named(model), version=version or 0, top_k=most, min_probability=least)
    _images.put(request, images)

    def read(reply: bytes) -> list[Classification]:
        return _results.classifications(vision_pb2.ClassifyResponse.FromString(reply), len(images), least)

    return UnaryCall("/rafaga.v1.Vision/Classify", request.SerializeToString(), read)


def features(images: Sequence[_images.Content], *, model: str, version: int | None) -> UnaryCall[list[Features]]:
    request = vision_pb2.ExtractFeaturesRequest(model=_named(model), version=version or 0)
    _images.put(request, images)

    def read(reply: bytes) -> list[Features]:
        return _results.features(vision_pb2.ExtractFeaturesResponse.FromString(reply), len(images))

    return UnaryCall("/rafaga.v1.Vision/ExtractFeatures", request.SerializeToString(), read)


def detect(
    images: Sequence[_images.Content], *, model: str, version: int | None, min_score: float, max_objects: int | None
) -> UnaryCall[list[Detections]]:
    most = 0 if max_objects is None else _positive("max_objects", max_objects)
    least = _share("min_score", min_score)
    request = vision_pb2.DetectRequest(model=_named(model), version=version or 0, min_score=least, max_objects=most)
    _images.put(request, images)

    def read(reply: bytes) -> list[Detections]:
        return _objects.detections(vision_pb2.DetectResponse.FromString(reply), len(images))

    return UnaryCall("/rafaga.v1.Vision/Detect", request.SerializeToString(), read)


def segment(
    images: Sequence[_images.Content], *, model: str, version: int | None, with_probabilities: bool
) -> UnaryCall[list[Segmentation]]:
    request = vision_pb2.SegmentRequest(
        model=_named(model), version=version or 0, with_probabilities=with_probabilities
    )
    _images.put(request, images)

    def read(reply: bytes) -> list[Segmentation]:
        return _objects.segmentations(vision_pb2.SegmentResponse.FromString(reply), len(images))

    return UnaryCall("/rafaga.v1.Vision/Segment", request.SerializeToString(), read)


def predict(
    sequences: Sequence[Sequence[str]], *, model: str, version: int | None, top_k: int
) -> UnaryCall[list[Continuation]]:
    request = sequences_pb2.PredictRequest(model=_named(model), version=version or 0, top_k=_positive("top_k", top_k))
    if len(sequences) == 1:
        request.symbols.extend(sequences[0])
    else:
        request.sequences.extend(sequences_pb2.Sequence(symbols=symbols) for symbols in sequences)

    def read(reply: bytes) -> list[Continuation]:
        return _results.continuations(sequences_pb2.PredictResponse.FromString(reply), len(sequences))

    return UnaryCall("/rafaga.v1.Sequences/Predict", request.SerializeToString(), read)


def forecast(
    asked: Sequence[Asked],
    *,
    model: str,
    version: int | None,
    horizon: int | None,
    quantiles: Sequence[float] | None = None,
    check_last: int = 0,
) -> UnaryCall[list[Forecast]]:
    """Of series with one frequency."""
    if horizon is not None and horizon < 1:
        raise InvalidRequest(f"horizon must be at least 1, got {horizon}; None asks for all steps that the model gives")
    if check_last < 0:
        raise InvalidRequest(f"check_last must be at least 0, got {check_last}")
    request = forecasting_pb2.ForecastRequest(
        model=_named(model),
        version=version or 0,
        horizon=horizon or 0,
        frequency=asked[0].frequency.name if asked[0].frequency else "",
        quantiles=quantiles or (),
        check_last=check_last,
    )
    if len(asked) == 1 and asked[0].plain and not check_last:
        request.history.extend(asked[0].message.values)
    else:
        request.series.extend(one.message for one in asked)

    def read(reply: bytes) -> list[Forecast]:
        return _forecast.forecasts(forecasting_pb2.ForecastResponse.FromString(reply), asked)

    return UnaryCall("/rafaga.v1.Forecasting/Forecast", request.SerializeToString(), read)


def models() -> UnaryCall[list[ModelDescription]]:
    def read(reply: bytes) -> list[ModelDescription]:
        return [_models.model_description(m) for m in catalog_pb2.ListModelsResponse.FromString(reply).models]

    return UnaryCall("/rafaga.v1.Catalog/ListModels", catalog_pb2.ListModelsRequest().SerializeToString(), read)


def model(name: str, *, version: int | None) -> UnaryCall[ModelDescription]:
    request = catalog_pb2.GetModelRequest(name=_named(name), version=version or 0)

    def read(reply: bytes) -> ModelDescription:
        response = catalog_pb2.GetModelResponse.FromString(reply)
        return _models.model_description(response.model, response.labels)

    return UnaryCall("/rafaga.v1.Catalog/GetModel", request.SerializeToString(), read)


def readiness(name: str | None) -> UnaryCall[list[ModelDescription]]:
    """Asks for the named model or for all; ModelNotReady, hence another try, while one of them is loading."""
    if name is None:
        every = models()
        return UnaryCall(every.method, every.request, lambda reply: _loaded(every.read(reply)))
    one = model(name, version=0)
    return UnaryCall(one.method, one.request, lambda reply: _loaded([one.read(reply)]))


def require_ready(descriptions: Sequence[ModelDescription]) -> None:
    """ModelNotReady naming every model that will not become ready by waiting, with the server's reason."""
    failed = [d for d in descriptions if d.state is ModelState.FAILED]
    if failed:
        raise ModelNotReady("; ".join(f"{d.name} version {d.version} failed to load: {d.reason}" for d in failed))


def checked_timeout_s(timeout_s: float) -> float:
    """ValueError for an invalid or missing deadline: every call must have one."""
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s must be a positive number of seconds, got {timeout_s}")
    return timeout_s


def read(call: UnaryCall[T], reply: bytes) -> T:
    try:
        return call.read(reply)
    except DecodeError:
        raise InternalError(f"the reply to {call.method} is not a message of rafaga.v1: check the port") from None


def error_from(rpc: grpc.RpcError, target: str, timeout_s: float) -> RafagaError:
    """The typed error of a failed call, with the server's message, or one of this API for errors of gRPC itself.

    Both APIs of grpcio raise RpcErrors with these three methods; its type stubs leave them out of the base class.
    """
    status: Any = rpc
    trailing = status.trailing_metadata() or ()
    error = from_status(status.code(), status.details() or "", trailing)
    if STATUS_DETAILS_KEY in dict(trailing):
        return error
    if isinstance(error, ServerUnreachable):
        cause = next((why for sign, why in _NOT_THERE.items() if sign in error.message), None)
        return ServerUnreachable(f"No server at {target} ({cause})" if cause else f"{target}: {error.message}")
    if isinstance(error, DeadlineExceeded):
        return DeadlineExceeded(f"no answer from {target} within {timeout_s:g} s")
    return error


def symbols(sequence: SymbolsInput) -> Prepared:
    """One sequence, checked. Raises InvalidRequest."""
    checked = list(column(sequence))
    if not checked or not all(isinstance(symbol, str) for symbol in checked):
        raise InvalidRequest("expected symbols, at least one, each of them text: \"BTP\" or ['B', 'T', 'P']")
    return Prepared(checked, None, sum(map(len, checked)))


def series(given: SeriesInput, covariates: Mapping[str, npt.ArrayLike] | None = None) -> Prepared:
    """One series, checked. Raises InvalidTensor."""
    asked = _history.asked(given, covariates)
    return Prepared(asked, asked.frequency and asked.frequency.name, asked.message.ByteSize())


def _positive(name: str, number: int) -> int:
    if number < 1:
        raise InvalidRequest(f"{name} must be at least 1, got {number}")
    return number


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise InvalidRequest(f"{name} must be from 0 to 1, got {value}")
    return value


def _named(model: str) -> str:
    if not model:
        raise InvalidRequest("the name of the model is empty")
    return model


def _loaded(descriptions: list[ModelDescription]) -> list[ModelDescription]:
    loading = [d.name for d in descriptions if d.state is ModelState.LOADING]
    if loading:
        raise ModelNotReady(f"still loading: {', '.join(loading)}")
    return descriptions
