"""The catalogue: models as a server describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from rafaga.client._results import rounded
from rafaga.v1 import catalog_pb2


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
    standard_error: float = 0.0  # of `value`, from the choice of samples; 0 unknown

    def __str__(self) -> str:
        error = f" ± {self.standard_error:.2g}" if self.standard_error else ""
        return f"{self.name} {self.value:.4g}{error}"


@dataclass(frozen=True)
class ForecastDescription:
    """Inputs and outputs of a forecaster; lengths in observations."""

    min_history: int
    max_history: int
    max_horizon: int
    quantile_levels: tuple[float, ...]
    step: str  # time between observations: "month"
    unit: str
    season: int = 1  # steps in one period; 1 without a season
    frequency: str = ""  # `step` as pandas names it, "MS"; empty: unknown
    covariates: tuple[str, ...] = ()  # those beginning with "calendar." follow from timestamps


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
    head: str = ""  # of a classifier: "logits", "probabilities", "multilabel", "binary" or "regression"
    engine: str = ""  # "onnxruntime" or "openvino"
    engine_reason: str = ""  # why it was chosen, and the precision
    instances: int = 0  # engines that run it at once; 0: not served, or unknown to an older server

    def __repr__(self) -> str:
        weights = "" if self.trained else "UNTRAINED"
        parts = (self.state.value, self.task, self.precision, weights, *map(str, self.metrics[:2]), self.reason)
        return f"ModelDescription({self.name!r} v{self.version}: {', '.join(filter(None, parts))})"


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
        metrics=tuple(
            MetricDescription(m.name, m.value, m.dataset, m.samples, m.standard_error) for m in model.metrics
        ),
        max_batch_size=model.max_batch_size,
        forecast=ForecastDescription(
            info.min_history,
            info.max_history,
            info.max_horizon,
            rounded(info.quantile_levels),
            info.step,
            info.unit,
            info.season,
            info.frequency,
            tuple(info.covariates),
        )
        if model.HasField("forecast")
        else None,
        image_preparation=model.image_preparation,
        detection=_detection(model.detection) if model.HasField("detection") else None,
        sequence=SequenceDescription(model.sequence.max_length) if model.HasField("sequence") else None,
        labels=tuple(labels),
        head=model.head,
        engine=model.engine,
        engine_reason=model.engine_reason,
        instances=model.instances,
    )


_STATES = {
    catalog_pb2.Model.LOADING: ModelState.LOADING,
    catalog_pb2.Model.READY: ModelState.READY,
    catalog_pb2.Model.FAILED: ModelState.FAILED,
    catalog_pb2.Model.DRAINING: ModelState.DRAINING,
}


def _detection(info: catalog_pb2.DetectionInfo) -> DetectionDescription:
    score, iou = rounded([info.score_threshold, info.iou_threshold])
    return DetectionDescription(info.max_objects, score, iou)


def _tensor(tensor: catalog_pb2.Tensor) -> TensorDescription:
    return TensorDescription(tensor.name, tensor.dtype, tuple(None if n < 0 else n for n in tensor.shape))
