"""Results of calls: frozen values made from protobuf replies.

Arrays are read-only views of the reply's bytes; copy one before changing it. Values that hold arrays compare by
identity, since numpy has no single truth value for "equal".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from rafaga.errors import InternalError
from rafaga.v1 import catalog_pb2, common_pb2, forecasting_pb2, sequences_pb2, vision_pb2

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ModelInfo:
    """Which model answered. `trained` False: its weights are random and its answers meaningless."""

    name: str
    version: int
    trained: bool
    precision: str  # "fp32", "fp16" or "int8"

    def __str__(self) -> str:
        return f"{self.name} v{self.version} {self.precision}{'' if self.trained else ' UNTRAINED'}"


@dataclass(frozen=True)
class Timing:
    """Where the server spent the time of one request, in microseconds, and how many rows shared its batch."""

    queue_us: int
    preprocess_us: int
    inference_us: int
    batch_size: int


@dataclass(frozen=True)
class Prediction:
    """One label and its probability."""

    label: str
    index: int
    probability: float

    def __repr__(self) -> str:
        return f"Prediction({self.label!r}, index={self.index}, probability={self.probability:.4f})"


@dataclass(frozen=True)
class Classification:
    """The most probable labels of one image, best first."""

    predictions: tuple[Prediction, ...]
    model: ModelInfo
    timing: Timing

    @property
    def top(self) -> Prediction:
        """The most probable label."""
        return self.predictions[0]

    def __repr__(self) -> str:
        labels = ", ".join(f"{p.label!r}: {p.probability:.4f}" for p in self.predictions)
        return f"Classification({{{labels}}}, model={str(self.model)!r})"


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """One output of a backbone.

    array: float32 [channels, height, width], or [dimensions] for an embedding. stride: input pixels per cell; 0 for an
    embedding.
    """

    name: str
    stride: int
    array: Float32Array

    def __repr__(self) -> str:
        return f"FeatureMap({self.name!r}, stride={self.stride}, shape={self.array.shape})"


@dataclass(frozen=True, eq=False)
class Features:
    """All maps of a call, in the model's order: `features["c4"].array`."""

    maps: tuple[FeatureMap, ...]
    model: ModelInfo
    timing: Timing

    def __getitem__(self, name: str) -> FeatureMap:
        for feature_map in self.maps:
            if feature_map.name == name:
                return feature_map
        raise KeyError(f"no map {name!r}; the model gives {', '.join(m.name for m in self.maps)}")

    def __iter__(self) -> Iterator[FeatureMap]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)

    def __repr__(self) -> str:
        return f"Features({', '.join(map(repr, self.maps))}, model={str(self.model)!r})"


@dataclass(frozen=True, eq=False)
class Forecast:
    """A forecast, in the unit of the history.

    levels: rising quantile levels. values: float32 [len(levels), horizon].
    """

    levels: tuple[float, ...]
    values: Float32Array
    model: ModelInfo
    timing: Timing

    @property
    def horizon(self) -> int:
        """How many steps were forecast."""
        return int(self.values.shape[1])

    @property
    def median(self) -> Float32Array:
        """The median, float32 [horizon]. ValueError if the model has no level 0.5."""
        return self.quantile(0.5)

    def quantile(self, level: float) -> Float32Array:
        """float32 [horizon]: the values that the truth falls below with probability `level`.

        ValueError for a level the model does not give; nothing is interpolated.
        """
        for row, known in enumerate(self.levels):
            if math.isclose(known, level, abs_tol=1e-6):
                quantile: Float32Array = self.values[row]
                return quantile
        raise ValueError(f"no quantile {level:g}; the model gives {', '.join(f'{known:g}' for known in self.levels)}")

    def interval(self, coverage: float) -> tuple[Float32Array, Float32Array]:
        """(lower, upper), float32 [horizon] each: the central interval that holds the truth with that probability.

        `interval(0.8)` lies between the quantiles 0.1 and 0.9. ValueError as for `quantile`.
        """
        return self.quantile((1 - coverage) / 2), self.quantile((1 + coverage) / 2)

    def __repr__(self) -> str:
        return f"Forecast(horizon={self.horizon}, levels={self.levels}, model={str(self.model)!r})"


@dataclass(frozen=True)
class Continuation:
    """The most probable next symbols of a sequence, best first."""

    predictions: tuple[Prediction, ...]
    model: ModelInfo
    timing: Timing

    @property
    def top(self) -> Prediction:
        """The most probable symbol."""
        return self.predictions[0]

    def __repr__(self) -> str:
        symbols = ", ".join(f"{p.label!r}: {p.probability:.4f}" for p in self.predictions)
        return f"Continuation({{{symbols}}}, model={str(self.model)!r})"


class ModelState(StrEnum):
    UNKNOWN = "unknown"  # a state of a newer server that this client does not know
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"


@dataclass(frozen=True)
class TensorDescription:
    """One input or output of a model. `shape`: None where any size is accepted."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{','.join('?' if n is None else str(n) for n in self.shape)}]"


@dataclass(frozen=True)
class MetricDescription:
    """A figure measured on held-out data when the model was exported."""

    name: str
    value: float
    dataset: str
    samples: int

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g}"


@dataclass(frozen=True)
class ForecastDescription:
    """Inputs and outputs of a forecaster; lengths in observations."""

    min_history: int
    max_history: int
    max_horizon: int
    quantile_levels: tuple[float, ...]
    step: str  # time between observations: "month"
    unit: str


@dataclass(frozen=True)
class DetectionDescription:
    """Outputs of a detector: at most `max_objects` per image, with scores above the threshold; of two boxes of one
    class whose intersection over union exceeds `iou_threshold`, the one with the higher score."""

    max_objects: int
    score_threshold: float
    iou_threshold: float


@dataclass(frozen=True)
class SequenceDescription:
    """Inputs of a next-symbol model; its labels are the known symbols. `max_length` in symbols."""

    max_length: int


@dataclass(frozen=True)
class ModelDescription:
    """A model as the server's catalogue describes it. Only `Client.model` fills `labels`."""

    name: str
    version: int
    state: ModelState
    reason: str  # why it is not served; empty if it is served
    task: str
    architecture: str
    dataset: str
    trained: bool
    weights_source: str
    weights_license: str
    precision: str
    inputs: tuple[TensorDescription, ...]
    outputs: tuple[TensorDescription, ...]
    metrics: tuple[MetricDescription, ...]
    max_batch_size: int
    forecast: ForecastDescription | None
    image_preparation: str
    detection: DetectionDescription | None
    sequence: SequenceDescription | None
    labels: tuple[str, ...] = ()

    def __repr__(self) -> str:
        parts = (self.state.value, self.task, self.precision, "" if self.trained else "UNTRAINED", self.reason)
        return f"ModelDescription({self.name!r} v{self.version}: {', '.join(filter(None, parts))})"


def classifications(reply: vision_pb2.ClassifyResponse, images: int) -> list[Classification]:
    """One per image. InternalError where the reply does not answer what was asked."""
    if len(reply.results) != images or not all(result.labels for result in reply.results):
        raise InternalError(f"expected labels for {images} images, the reply has {len(reply.results)} results")
    model, spent = model_info(reply.model), timing(reply.timing)
    return [Classification(tuple(map(_prediction, result.labels)), model, spent) for result in reply.results]


def features(reply: vision_pb2.ExtractFeaturesResponse, images: int) -> list[Features]:
    """One per image. InternalError where the reply does not answer what was asked."""
    model, spent = model_info(reply.model), timing(reply.timing)
    maps = [(each.name, each.stride, _float32_rows(each, images)) for each in reply.maps]
    return [
        Features(tuple(FeatureMap(name, stride, rows[i]) for name, stride, rows in maps), model, spent)
        for i in range(images)
    ]


def forecasts(reply: forecasting_pb2.ForecastResponse, series: int) -> list[Forecast]:
    """One per series. InternalError where the reply does not answer what was asked."""
    found = [each.quantiles for each in reply.forecasts] or [reply.quantiles]
    if len(found) != series:
        raise InternalError(f"expected forecasts of {series} series, the reply has {len(found)}")
    model, spent = model_info(reply.model), timing(reply.timing)
    return [_forecast(quantiles, model, spent) for quantiles in found]


def continuations(reply: sequences_pb2.PredictResponse, sequences: int) -> list[Continuation]:
    """One per sequence. InternalError where the reply does not answer what was asked."""
    found = [each.labels for each in reply.continuations] or [reply.labels]
    if len(found) != sequences or not all(found):
        raise InternalError(f"expected symbols for {sequences} sequences, the reply has {len(found)} results")
    model, spent = model_info(reply.model), timing(reply.timing)
    return [Continuation(tuple(map(_prediction, labels)), model, spent) for labels in found]


def model_description(model: catalog_pb2.Model, labels: Sequence[str] = ()) -> ModelDescription:
    info = model.forecast
    return ModelDescription(
        name=model.name,
        version=model.version,
        state=_STATES.get(model.state, ModelState.UNKNOWN),
        reason=model.reason,
        task=model.task,
        architecture=model.architecture,
        dataset=model.dataset,
        trained=model.trained,
        weights_source=model.weights_source,
        weights_license=model.weights_license,
        precision=model.precision,
        inputs=tuple(map(_tensor, model.inputs)),
        outputs=tuple(map(_tensor, model.outputs)),
        metrics=tuple(MetricDescription(m.name, m.value, m.dataset, m.samples) for m in model.metrics),
        max_batch_size=model.max_batch_size,
        forecast=ForecastDescription(
            info.min_history, info.max_history, info.max_horizon, _levels(info.quantile_levels), info.step, info.unit
        )
        if model.HasField("forecast")
        else None,
        image_preparation=model.image_preparation,
        detection=_detection(model.detection) if model.HasField("detection") else None,
        sequence=SequenceDescription(model.sequence.max_length) if model.HasField("sequence") else None,
        labels=tuple(labels),
    )


_STATES = {
    catalog_pb2.Model.LOADING: ModelState.LOADING,
    catalog_pb2.Model.READY: ModelState.READY,
    catalog_pb2.Model.FAILED: ModelState.FAILED,
    catalog_pb2.Model.DRAINING: ModelState.DRAINING,
}


def model_info(info: common_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(info.name, info.version, info.trained, info.precision)


def timing(spent: common_pb2.Timing) -> Timing:
    return Timing(spent.queue_us, spent.preprocess_us, spent.inference_us, spent.batch_size)


def _prediction(scored: common_pb2.ScoredLabel) -> Prediction:
    return Prediction(scored.label, scored.index, scored.probability)


def _detection(info: catalog_pb2.DetectionInfo) -> DetectionDescription:
    score, iou = _levels([info.score_threshold, info.iou_threshold])
    return DetectionDescription(info.max_objects, score, iou)


def _tensor(tensor: catalog_pb2.Tensor) -> TensorDescription:
    return TensorDescription(tensor.name, tensor.dtype, tuple(None if n < 0 else n for n in tensor.shape))


def _levels(levels: Sequence[float]) -> tuple[float, ...]:
    """The wire has float32: 0.1 arrives as 0.10000000149."""
    return tuple(round(level, 6) for level in levels)


def _forecast(quantiles: Sequence[forecasting_pb2.QuantileForecast], model: ModelInfo, spent: Timing) -> Forecast:
    lengths = {len(q.values) for q in quantiles}
    if len(lengths) != 1:
        raise InternalError(f"expected quantiles of one length, the reply has lengths {sorted(lengths)}")
    values = np.array([q.values for q in quantiles], dtype=np.float32)
    values.flags.writeable = False
    return Forecast(_levels([q.level for q in quantiles]), values, model, spent)


def _float32_rows(feature_map: vision_pb2.FeatureMap, images: int) -> Float32Array:
    """[images, …], read-only."""
    shape = tuple(feature_map.shape)
    if shape[:1] != (images,) or math.prod(shape) * 4 != len(feature_map.data):
        raise InternalError(
            f"map {feature_map.name}: expected float32 of {images} images, got shape {list(shape)} "
            f"and {len(feature_map.data)} bytes"
        )
    return np.frombuffer(feature_map.data, dtype="<f4").astype(np.float32, copy=False).reshape(shape)
