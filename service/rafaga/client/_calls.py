"""The calls of the API as values: where a request goes, its bytes, how its reply is read, what its errors mean.

Both clients run these; neither knows a protobuf message. Requests are serialised once, however often they are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from rafaga.client import _images, _objects, _results
from rafaga.client._objects import Detections, Segmentation
from rafaga.client._results import (
    Classification,
    Continuation,
    Features,
    Forecast,
    ModelDescription,
    ModelState,
)
from rafaga.errors import (
    STATUS_DETAILS_KEY,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    InvalidTensor,
    ModelNotReady,
    RafagaError,
    ServerUnreachable,
    from_status,
)
from rafaga.v1 import catalog_pb2, forecasting_pb2, sequences_pb2, vision_pb2

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T_co]):
    """One unary call. `read` raises what the reply itself says is wrong; a Refused from it is retried like any."""

    method: str
    request: bytes
    read: Callable[[bytes], T_co]


def classify(image: _images.ImageInput, *, model: str, version: int, top_k: int) -> Call[Classification]:
    return _first(_classify(_images.single(image), model, version, top_k))


def classify_many(
    images: Sequence[_images.ImageInput] | npt.NDArray[np.uint8], *, model: str, version: int, top_k: int
) -> Call[list[Classification]]:
    return _classify(_images.many(images), model, version, top_k)


def features(image: _images.ImageInput | Sequence[_images.ImageInput], *, model: str, version: int) -> Call[Features]:
    batched = _images.is_batch(image)
    wire = _images.many(image) if batched else _images.single(image)  # type: ignore[arg-type]  # is_batch told them apart
    request = vision_pb2.ExtractFeaturesRequest(model=_named(model), version=version)
    _put(request, wire)

    def read(reply: bytes) -> Features:
        return _results.features(vision_pb2.ExtractFeaturesResponse.FromString(reply), batched=batched)

    return Call("/rafaga.v1.Vision/ExtractFeatures", request.SerializeToString(), read)


def detect(
    image: _images.ImageInput, *, model: str, version: int, min_score: float, max_objects: int | None
) -> Call[Detections]:
    return _first(_detect(_images.single(image), model, version, min_score, max_objects))


def detect_many(
    images: Sequence[_images.ImageInput] | npt.NDArray[np.uint8],
    *,
    model: str,
    version: int,
    min_score: float,
    max_objects: int | None,
) -> Call[list[Detections]]:
    return _detect(_images.many(images), model, version, min_score, max_objects)


def segment(image: _images.ImageInput, *, model: str, version: int, with_probabilities: bool) -> Call[Segmentation]:
    return _first(_segment(_images.single(image), model, version, with_probabilities))


def segment_many(
    images: Sequence[_images.ImageInput] | npt.NDArray[np.uint8],
    *,
    model: str,
    version: int,
    with_probabilities: bool,
) -> Call[list[Segmentation]]:
    return _segment(_images.many(images), model, version, with_probabilities)


def predict(symbols: Sequence[str], *, model: str, version: int, top_k: int) -> Call[Continuation]:
    if not len(symbols) or not all(isinstance(symbol, str) for symbol in symbols):
        raise InvalidRequest("expected symbols, at least one, each of them text: \"BTP\" or ['B', 'T', 'P']")
    request = sequences_pb2.PredictRequest(
        model=_named(model), version=version, symbols=symbols, top_k=_positive("top_k", top_k)
    )

    def read(reply: bytes) -> Continuation:
        return _results.continuation(sequences_pb2.PredictResponse.FromString(reply))

    return Call("/rafaga.v1.Sequences/Predict", request.SerializeToString(), read)


def forecast(
    values: Sequence[float] | npt.NDArray[Any], *, model: str, version: int, horizon: int | None
) -> Call[Forecast]:
    if horizon is not None and horizon < 1:
        raise InvalidRequest(f"horizon starts at 1, got {horizon}; None asks for as far as the model goes")
    request = forecasting_pb2.ForecastRequest(
        model=_named(model), version=version, history=_history(values), horizon=horizon or 0
    )

    def read(reply: bytes) -> Forecast:
        return _results.forecast(forecasting_pb2.ForecastResponse.FromString(reply))

    return Call("/rafaga.v1.Forecasting/Forecast", request.SerializeToString(), read)


def models() -> Call[list[ModelDescription]]:
    def read(reply: bytes) -> list[ModelDescription]:
        return [_results.model_description(m) for m in catalog_pb2.ListModelsResponse.FromString(reply).models]

    return Call("/rafaga.v1.Catalog/ListModels", catalog_pb2.ListModelsRequest().SerializeToString(), read)


def model(name: str, *, version: int) -> Call[ModelDescription]:
    request = catalog_pb2.GetModelRequest(name=_named(name), version=version)

    def read(reply: bytes) -> ModelDescription:
        response = catalog_pb2.GetModelResponse.FromString(reply)
        return _results.model_description(response.model, response.labels)

    return Call("/rafaga.v1.Catalog/GetModel", request.SerializeToString(), read)


def readiness(name: str | None) -> Call[list[ModelDescription]]:
    """Asks for the named model or for all; ModelNotReady, hence another try, while one of them is loading."""
    if name is None:
        every = models()
        return Call(every.method, every.request, lambda reply: _loaded(every.read(reply)))
    one = model(name, version=0)
    return Call(one.method, one.request, lambda reply: _loaded([one.read(reply)]))


def require_ready(descriptions: Sequence[ModelDescription]) -> None:
    """ModelNotReady naming every model that will not become ready by waiting, with the server's reason."""
    failed = [d for d in descriptions if d.state is ModelState.FAILED]
    if failed:
        raise ModelNotReady("; ".join(f"{d.name} version {d.version} failed to load: {d.reason}" for d in failed))


def checked_timeout_s(timeout_s: float) -> float:
    """ValueError for a deadline that is none: every call has to end some day."""
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s must be a positive number of seconds, got {timeout_s}")
    return timeout_s


def read(call: Call[T], reply: bytes) -> T:
    try:
        return call.read(reply)
    except DecodeError:
        raise InternalError(
            f"the reply to {call.method} is not what rafaga.v1 defines; is it the right port?"
        ) from None


def error_from(rpc: grpc.RpcError, target: str, timeout_s: float) -> RafagaError:
    """The typed error of a failed call, in the server's words; what gRPC itself reports gets those of this API.

    Both APIs of grpcio raise RpcErrors with these three methods; its type stubs leave them out of the base class.
    """
    status: Any = rpc
    trailing = status.trailing_metadata() or ()
    error = from_status(status.code(), status.details() or "", trailing)
    if STATUS_DETAILS_KEY in dict(trailing):
        return error
    if isinstance(error, ServerUnreachable):
        return ServerUnreachable(f"{target}: {error.message}")
    if isinstance(error, DeadlineExceeded):
        return DeadlineExceeded(f"no answer from {target} within {timeout_s:g} s")
    return error


def _classify(wire: _images.Wire, model: str, version: int, top_k: int) -> Call[list[Classification]]:
    request = vision_pb2.ClassifyRequest(model=_named(model), version=version, top_k=_positive("top_k", top_k))
    _put(request, wire)
    images = _images.rows(wire)

    def read(reply: bytes) -> list[Classification]:
        return _results.classifications(vision_pb2.ClassifyResponse.FromString(reply), images)

    return Call("/rafaga.v1.Vision/Classify", request.SerializeToString(), read)


def _detect(
    wire: _images.Wire, model: str, version: int, min_score: float, max_objects: int | None
) -> Call[list[Detections]]:
    if not 0 <= min_score <= 1:
        raise InvalidRequest(f"min_score lies between 0 and 1, got {min_score}")
    most = 0 if max_objects is None else _positive("max_objects", max_objects)
    request = vision_pb2.DetectRequest(model=_named(model), version=version, min_score=min_score, max_objects=most)
    _put(request, wire)
    images = _images.rows(wire)

    def read(reply: bytes) -> list[Detections]:
        return _objects.detections(vision_pb2.DetectResponse.FromString(reply), images)

    return Call("/rafaga.v1.Vision/Detect", request.SerializeToString(), read)


def _segment(wire: _images.Wire, model: str, version: int, with_probabilities: bool) -> Call[list[Segmentation]]:
    request = vision_pb2.SegmentRequest(model=_named(model), version=version, with_probabilities=with_probabilities)
    _put(request, wire)
    images = _images.rows(wire)

    def read(reply: bytes) -> list[Segmentation]:
        return _objects.segmentations(vision_pb2.SegmentResponse.FromString(reply), images)

    return Call("/rafaga.v1.Vision/Segment", request.SerializeToString(), read)


def _first(call: Call[list[T]]) -> Call[T]:
    """Of a request with one image."""
    return Call(call.method, call.request, lambda reply: call.read(reply)[0])


def _put(
    request: vision_pb2.ClassifyRequest
    | vision_pb2.ExtractFeaturesRequest
    | vision_pb2.DetectRequest
    | vision_pb2.SegmentRequest,
    wire: _images.Wire,
) -> None:
    if isinstance(wire, vision_pb2.EncodedImages):
        request.encoded.CopyFrom(wire)
    else:
        request.pixels.CopyFrom(wire)


def _positive(name: str, number: int) -> int:
    if number < 1:
        raise InvalidRequest(f"{name} starts at 1, got {number}")
    return number


def _named(model: str) -> str:
    if not model:
        raise InvalidRequest("which model? its name is empty")
    return model


def _history(values: Sequence[float] | npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """float32 [T], finite. InvalidTensor otherwise."""
    try:
        history = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        raise InvalidTensor("the history must be numbers, oldest first") from None
    if history.ndim != 1 or not history.size:
        raise InvalidTensor(f"the history must be one row of numbers [T], got shape {list(history.shape)}")
    bad = np.flatnonzero(~np.isfinite(history))
    if bad.size:
        raise InvalidTensor(
            f"the history must be finite; {bad.size} of {history.size} values are not, the first at position {bad[0]}: "
            "fill the gaps before asking"
        )
    return history


def _loaded(descriptions: list[ModelDescription]) -> list[ModelDescription]:
    loading = [d.name for d in descriptions if d.state is ModelState.LOADING]
    if loading:
        raise ModelNotReady(f"still loading: {', '.join(loading)}")
    return descriptions
