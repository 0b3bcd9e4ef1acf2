"""The description of a model.onnx without a bundle, read from its graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rafaga.bundle import (
    DetectionSpec,
    FeatureSpec,
    ForecastSpec,
    Head,
    ImagePreparation,
    Provenance,
    SequenceSpec,
    TensorSpec,
    Weights,
)


@dataclass(frozen=True)
class PlainModel:
    """The part of a Bundle that serving reads. It has no task, so clients send and receive tensors only.

    max_batch_size 0: the graph has no free first dimension, or its rows depend on each other. Then a request is one
    run, and the shapes have no batch dimension. empty_inputs: whether inputs may have no elements.
    """

    name: str
    version: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    empty_inputs: bool = True

    task: ClassVar[None] = None
    architecture: ClassVar[str] = ""
    dataset: ClassVar[str] = ""
    labels: ClassVar[tuple[str, ...]] = ()
    head: ClassVar[Head] = Head.LOGITS
    image: ClassVar[ImagePreparation | None] = None
    forecast: ClassVar[ForecastSpec | None] = None
    detection: ClassVar[DetectionSpec | None] = None
    sequence: ClassVar[SequenceSpec | None] = None
    ragged: ClassVar[bool] = False
    allow_non_finite: ClassVar[bool] = True  # what NaN means in it is not known here
    features: ClassVar[tuple[FeatureSpec, ...]] = ()
    weights: ClassVar[Weights] = Weights(trained=False, source="unverified: plain ONNX, no bundle", license="unknown")
    parameters: ClassVar[int] = 0
    provenance: ClassVar[Provenance | None] = None
