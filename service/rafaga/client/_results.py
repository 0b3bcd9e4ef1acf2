"""Results of calls: frozen values made from protobuf replies.

Arrays are read-only views of the reply's bytes; copy one before changing it. Values that hold arrays compare by
identity, since numpy has no single truth value for "equal".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rafaga.client import _html
from rafaga.errors import InternalError
from rafaga.v1 import common_pb2, sequences_pb2, vision_pb2

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ModelInfo:
    """Which model answered. `trained` False: its weights are random and its answers meaningless."""

    name: str
    version: int
    trained: bool
    precision: str  # "fp32", "bf16", "fp16" or "int8"
    engine: str = ""  # "onnxruntime" or "openvino"

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
class _Ranked:
    """Predictions, best first: iterate, index, or take the `top`."""

    predictions: tuple[Prediction, ...]
    model: ModelInfo
    timing: Timing

    @property
    def top(self) -> Prediction:
        """The most probable one. Raises IndexError if there is none."""
        return self.predictions[0]

    def __getitem__(self, rank: int) -> Prediction:
        return self.predictions[rank]

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.predictions)

    def __len__(self) -> int:
        return len(self.predictions)

    def __repr__(self) -> str:
        labels = ", ".join(f"{p.label!r}: {p.probability:.4f}" for p in self)
        return f"{type(self).__name__}({{{labels}}}, model={str(self.model)!r})"

    def _repr_html_(self) -> str:
        return _html.table(self.model, ("label", "probability"), [(p.label, p.probability) for p in self])


@dataclass(frozen=True, repr=False)
class Classification(_Ranked):
    """The most probable labels of one image, best first; or the `values` of a regression model, without predictions.

    Probabilities sum to 1 over all labels, or are independent if the model is multilabel: then `at_least(0.5)` gives
    the labels that the image probably has.
    """

    values: Mapping[str, float] = field(default_factory=dict, hash=False)  # by label, in the model's order

    def at_least(self, probability: float) -> tuple[Prediction, ...]:
        """Those of the returned labels that have at least this probability: ask for all with `min_probability`."""
        return tuple(p for p in self if p.probability >= probability)

    def __repr__(self) -> str:
        if not self.values:
            return super().__repr__()
        values = ", ".join(f"{label!r}: {value:.6g}" for label, value in self.values.items())
        return f"Classification({{{values}}}, model={str(self.model)!r})"

    def _repr_html_(self) -> str:
        if not self.values:
            return super()._repr_html_()
        return _html.table(self.model, ("output", "value"), list(self.values.items()))


class Continuation(_Ranked):
    """The most probable next symbols of a sequence, best first."""


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
        low, mean, high = self.array.min(), self.array.mean(), self.array.max()
        values = f"min={low:.4g}, mean={mean:.4g}, max={high:.4g}"
        return f"FeatureMap({self.name!r}, stride={self.stride}, shape={self.array.shape}, {values})"


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

    def _repr_html_(self) -> str:
        rows = [(m.name, m.stride, list(m.array.shape), m.array.min(), m.array.mean(), m.array.max()) for m in self]
        return _html.table(self.model, ("map", "stride", "shape", "min", "mean", "max"), rows)


def classifications(
    reply: vision_pb2.ClassifyResponse, images: int, min_probability: float = 0.0
) -> list[Classification]:
    """One per image. InternalError where the reply does not answer what was asked."""
    answered = all(result.labels or result.values for result in reply.results)
    if len(reply.results) != images or not (answered or min_probability):
        raise InternalError(f"expected labels for {images} images, the reply has {len(reply.results)} results")
    model, spent = model_info(reply.model), timing(reply.timing)
    return [
        Classification(tuple(map(_prediction, each.labels)), model, spent, {v.label: v.value for v in each.values})
        for each in reply.results
    ]


def features(reply: vision_pb2.ExtractFeaturesResponse, images: int) -> list[Features]:
    """One per image. InternalError where the reply does not answer what was asked."""
    model, spent = model_info(reply.model), timing(reply.timing)
    maps = [(each.name, each.stride, _float32_rows(each, images)) for each in reply.maps]
    return [
        Features(tuple(FeatureMap(name, stride, rows[i]) for name, stride, rows in maps), model, spent)
        for i in range(images)
    ]


def continuations(reply: sequences_pb2.PredictResponse, sequences: int) -> list[Continuation]:
    """One per sequence. InternalError where the reply does not answer what was asked."""
    found = [each.labels for each in reply.continuations] or [reply.labels]
    if len(found) != sequences or not all(found):
        raise InternalError(f"expected symbols for {sequences} sequences, the reply has {len(found)} results")
    model, spent = model_info(reply.model), timing(reply.timing)
    return [Continuation(tuple(map(_prediction, labels)), model, spent) for labels in found]


def model_info(info: common_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(info.name, info.version, info.trained, info.precision, info.engine)


def rounded(levels: Iterable[float]) -> tuple[float, ...]:
    """The wire has float32: 0.1 arrives as 0.10000000149."""
    return tuple(round(level, 6) for level in levels)


def timing(spent: common_pb2.Timing) -> Timing:
    return Timing(spent.queue_us, spent.preprocess_us, spent.inference_us, spent.batch_size)


def _prediction(scored: common_pb2.ScoredLabel) -> Prediction:
    return Prediction(scored.label, scored.index, scored.probability)


def _float32_rows(feature_map: vision_pb2.FeatureMap, images: int) -> Float32Array:
    """[images, …], read-only."""
    shape = tuple(feature_map.shape)
    if shape[:1] != (images,) or math.prod(shape) * 4 != len(feature_map.data):
        raise InternalError(
            f"map {feature_map.name}: expected float32 of {images} images, got shape {list(shape)} "
            f"and {len(feature_map.data)} bytes"
        )
    return np.frombuffer(feature_map.data, dtype="<f4").astype(np.float32, copy=False).reshape(shape)
