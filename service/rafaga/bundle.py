"""The contract between export and service: a folder with a model, its description, and its golden answers.

    <repository>/<model>/<version>/
      model.onnx  model.fp16.onnx  model.int8.onnx   whichever variants were published
      bundle.json                                    `Bundle`, below
      golden.npz                                     `input.<name>` and `output.<name>`, computed by PyTorch

`load` checks the schema, `checksums.verify_files` the sha256 of every file. Running the golden inputs is the engine's
part. `publishing.publish` writes a bundle.
"""

from __future__ import annotations

import hashlib
import os
import re
from enum import StrEnum
from pathlib import Path

import msgspec

from rafaga import calendar
from rafaga.errors import BundleError
from rafaga.files import MOST_TEXT_BYTES, contents, opened_in

SCHEMA = 1
MANIFEST = "bundle.json"
GOLDEN = "golden.npz"
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
VERSION_PATTERN = re.compile(r"[1-9][0-9]{0,17}")  # as a decimal number it fits an int64
FILE_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Task(StrEnum):
    CLASSIFICATION = "classification"
    FEATURES = "features"
    FORECASTING = "forecasting"
    DETECTION = "detection"
    SEGMENTATION = "segmentation"
    SEQUENCE = "sequence"


class Precision(StrEnum):
    """Of a file, except bf16: some engines multiply the numbers of the fp32 file in it."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"


class EngineName(StrEnum):
    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"


class Head(StrEnum):
    """What a classifier's network gave before export, which adds the softmax to `logits`, and the sigmoid to
    `multilabel` and `binary` if they lack it. Probabilities of `multilabel` are independent, all others sum to 1.
    `regression` gives values, one for each label, as they are.
    """

    LOGITS = "logits"
    PROBABILITIES = "probabilities"
    MULTILABEL = "multilabel"
    BINARY = "binary"
    REGRESSION = "regression"


class Interpolation(StrEnum):
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    NEAREST = "nearest"


class Frozen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True): ...


class TensorSpec(Frozen, frozen=True):
    """One input or output of the graph. `shape`: None where the size is free; the first axis is always the batch."""

    name: str
    dtype: str  # numpy's name: "uint8", "int64", "float32"
    shape: tuple[int | None, ...]


class ImagePreparation(Frozen, frozen=True):
    """How an encoded image becomes the model's uint8 [height, width, channels] input.

    Resize the shorter side to `resize_shorter` (None: to exactly height x width), then crop the centre. `height` and
    `width` are None for models that take any size: nothing is cropped, and without `resize_shorter` nothing is resized.
    `max_longer` bounds the longer side. Bilinear and bicubic are antialiased, like torchvision's transforms of PIL
    images.
    """

    height: int | None
    width: int | None
    channels: int  # 1 grey, 3 RGB
    resize_shorter: int | None = None
    max_longer: int | None = None
    interpolation: Interpolation = Interpolation.BILINEAR
    # Whether photos are turned upright as their EXIF data says; training that ignored it needs False.
    exif_orientation: bool = True

    @property
    def cropped(self) -> bool:
        return self.height is not None and self.resize_shorter is not None


class FeatureSpec(Frozen, frozen=True):
    """Which output carries which map; `stride` in input pixels per cell, 0 for an embedding."""

    output: str
    stride: int


class ForecastSpec(Frozen, frozen=True):
    """Inputs and outputs of a forecaster. Inputs `history` float32 [N, T] right-padded with zeros and `length` int64
    [N]; output `quantiles` float32 [N, max_horizon, len(quantile_levels)]. With covariates, also the inputs
    `past_covariates` float32 [N, T, C], padded like `history`, and `future_covariates` float32 [N, max_horizon, C].
    """

    min_history: int
    max_history: int
    max_horizon: int
    quantile_levels: tuple[float, ...]
    season: int  # steps in one period; 1 without a season
    step: str  # time between observations: "month", "hour", "trading day"
    unit: str
    frequency: str = ""  # `step` as pandas names it: "MS", "h", "B"; empty: unknown
    covariates: tuple[str, ...] = ()  # names, in the order of the axis C; "calendar.month" etc. follow from timestamps

    def __post_init__(self) -> None:
        """Raises ValueError for a frequency or a calendar feature that is not known."""
        calendar.check(self.frequency, self.covariates)


class DetectionSpec(Frozen, frozen=True):
    """Outputs of a detector: always `max_objects` rows per image, so that images share a batch.

    Outputs `boxes` float32 [N, max_objects, 4], x_min, y_min, x_max, y_max in pixels of the input, `scores` float32
    [N, max_objects], best first, and `labels` int64 [N, max_objects], indices into the bundle's labels. Where
    fewer objects are found, the rest of the rows is zeros.
    """

    max_objects: int
    score_threshold: float  # objects with lower scores are left out
    iou_threshold: float  # of two boxes of one class that overlap by more, the one with the lower score is left out


class SequenceSpec(Frozen, frozen=True):
    """Inputs and outputs of a next-symbol model. Inputs `symbols` int64 [N, T], indices into the bundle's labels,
    right-padded with zeros, and `length` int64 [N]; output `probabilities` float32 [N, len(labels)] of the symbol that
    follows.
    """

    max_length: int


class Metric(Frozen, frozen=True):
    """A figure measured on held-out data, e.g. top1 0.991 on "MNIST test" with 10000 samples."""

    name: str
    value: float
    dataset: str
    samples: int
    standard_error: float = 0.0  # of `value`, from the choice of samples; 0 unknown


class Parity(Frozen, frozen=True):
    """Largest differences from PyTorch over all outputs and batch sizes; relative: max|a - b| / max|b| per output.

    `largest_input`: the shape of the largest row of the first input that was compared; empty unknown.
    """

    max_absolute_error: float
    max_relative_error: float
    batch_sizes: tuple[int, ...]
    largest_input: tuple[int, ...] = ()

    @property
    def golden_tolerance(self) -> float:
        """Largest `relative_error` at which answers to the golden inputs count as right on any machine.

        Wider than the error that export measured, because other processors add in another order and GPUs may round to
        TF32. The smaller of the two measured errors counts: for small probabilities the relative one would let anything
        pass.
        """
        return tolerance(min(self.max_relative_error, self.max_absolute_error))


def tolerance(measured: float) -> float:
    """The error to allow on other machines if export measured `measured`."""
    return max(1e-3, 2 * measured)


class Loss(Frozen, frozen=True):
    """A variant's loss against the fp32 file on the same samples: `drop` of the figure `metric`, a fraction of 1. The
    fp32 file has the same figure, or 1 if the figure measures similarity to that file. `samples`: how many; 0 unknown.
    """

    metric: str
    drop: float
    allowed_drop: float
    samples: int = 0

    @property
    def within(self) -> bool:
        return self.drop <= self.allowed_drop


class Calibration(Frozen, frozen=True):
    """The data for the ranges of an int8 file's activations; `dataset` is "noise" if there were no images."""

    dataset: str
    samples: int


class Variant(Frozen, frozen=True):
    """One ONNX file.

    Not `default_eligible`: it lost more accuracy than allowed, or its `loss` is unknown or from too few samples.
    `float_layers` names the nodes of an int8 file that stay in float because quantising them costs too much.
    `cpu_speedup` is its throughput over the fp32 file's on one thread of the processor that exported it; 0 unmeasured.
    `cpu_quick_int8`: whether that processor was `rafaga.int8.quick`; None unknown.
    `losses`: of the main figure and of its parts, such as "recall of defect"; `loss` is the one that exceeds its limit,
    or the main figure's.
    """

    precision: Precision
    file: str
    parity: Parity
    metrics: tuple[Metric, ...] = ()
    default_eligible: bool = True
    float_layers: tuple[str, ...] = ()
    cpu_speedup: float = 0.0
    cpu_quick_int8: bool | None = None
    loss: Loss | None = None
    losses: tuple[Loss, ...] = ()
    calibration: Calibration | None = None


class EngineAccuracy(Frozen, frozen=True):
    """A variant in another engine than ONNX Runtime's CPU provider, which `Variant` describes. bf16 runs the fp32 file.

    The figures hold on processors that multiply with the same `instruction_set`, see `rafaga.processor`; "" unknown.
    """

    engine: EngineName
    precision: Precision
    instruction_set: str
    parity: Parity
    metrics: tuple[Metric, ...] = ()
    default_eligible: bool = True
    loss: Loss | None = None
    losses: tuple[Loss, ...] = ()


class Weights(Frozen, frozen=True):
    """Where the parameters come from. `trained` False: random, for load tests only."""

    trained: bool
    source: str
    license: str
    sha256: str = ""


class Provenance(Frozen, frozen=True):
    created: str  # ISO 8601, UTC
    rafaga: str
    torch: str
    onnx: str
    opset: int


class Bundle(Frozen, frozen=True):
    """bundle.json."""

    schema: int
    name: str
    version: int
    task: Task
    architecture: str
    dataset: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: Weights
    variants: tuple[Variant, ...]
    provenance: Provenance
    files: dict[str, str]  # sha256 by file name
    labels: tuple[str, ...] = ()
    image: ImagePreparation | None = None
    features: tuple[FeatureSpec, ...] = ()
    forecast: ForecastSpec | None = None
    detection: DetectionSpec | None = None
    sequence: SequenceSpec | None = None
    parameters: int = 0  # number of trained parameters
    max_batch_size: int = 32
    head: Head = Head.LOGITS
    allow_non_finite: bool = False  # NaN and infinity are answers; otherwise the server answers with an error
    assumptions: tuple[str, ...] = ()  # what export took for granted about your own model's inputs and labels
    engines: tuple[EngineAccuracy, ...] = ()

    def variant(self, precision: Precision) -> Variant | None:
        return next((v for v in self.variants if v.precision == precision), None)

    @property
    def ragged(self) -> bool:
        """Whether rows of different lengths share a batch: series and sequences, each with its `length`."""
        return self.forecast is not None or self.sequence is not None

    def __post_init__(self) -> None:
        """Raises ValueError where the parts contradict each other (msgspec reports it with the file's other errors)."""
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema} is not supported; this version reads schema {SCHEMA}")
        if not NAME_PATTERN.fullmatch(self.name):
            raise ValueError(f"name {self.name!r} does not match {NAME_PATTERN.pattern}")
        if self.version < 1 or self.max_batch_size < 1:
            raise ValueError("version and max_batch_size must be at least 1")
        if not self.variants or not self.inputs or not self.outputs:
            raise ValueError("a bundle needs at least one variant, one input and one output")
        for file in (*self.files, *(v.file for v in self.variants)):
            if not FILE_PATTERN.fullmatch(file):
                raise ValueError(f"file name {file!r} does not match {FILE_PATTERN.pattern}")
        self._check_task()
        if not {f.output for f in self.features} <= {o.name for o in self.outputs}:
            raise ValueError("features names an output that the graph does not have")

    def _check_task(self) -> None:
        task, image = self.task, self.image
        needed = {
            Task.CLASSIFICATION: ("image", "labels"),
            Task.FEATURES: ("image", "features"),
            Task.FORECASTING: ("forecast",),
            Task.DETECTION: ("image", "labels", "detection"),
            Task.SEGMENTATION: ("image", "labels"),
            Task.SEQUENCE: ("labels", "sequence"),
        }
        if missing := [part for part in needed[task] if not getattr(self, part)]:
            raise ValueError(f"task {task} lacks {', '.join(missing)}")
        if image is not None:
            if task in (Task.DETECTION, Task.SEGMENTATION) and image.cropped:
                raise ValueError(f"task {task} needs the whole image: resize_shorter does not go with a fixed size")
            if image.max_longer is not None and image.resize_shorter is None:
                raise ValueError("max_longer needs resize_shorter")
        inputs = _COVARIATE_INPUTS if self.forecast and self.forecast.covariates else _INPUTS.get(task)
        for given, expected in ((self.inputs, inputs), (self.outputs, _OUTPUTS.get(task))):
            if expected is not None and tuple((t.name, t.dtype, len(t.shape)) for t in given) != expected:
                words = ", ".join(f"{name} {dtype} of {axes} axes" for name, dtype, axes in expected)
                raise ValueError(f"task {task} has the tensors {words}")


# Name, dtype and number of axes, of the tasks whose services go by them.
_Tensors = tuple[tuple[str, str, int], ...]
_INPUTS: dict[Task, _Tensors] = {Task.SEQUENCE: (("symbols", "int64", 2), ("length", "int64", 1))}
_COVARIATE_INPUTS: _Tensors = (
    *(("history", "float32", 2), ("length", "int64", 1)),
    *(("past_covariates", "float32", 3), ("future_covariates", "float32", 3)),
)
_OUTPUTS = {
    Task.DETECTION: (("boxes", "float32", 3), ("scores", "float32", 2), ("labels", "int64", 2)),
    Task.SEGMENTATION: (("labels", "uint8", 3), ("probabilities", "float32", 3)),
    Task.SEQUENCE: (("probabilities", "float32", 2),),
}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(folder: Path, place: tuple[str, int] | None = None) -> Bundle:
    """Reads and checks bundle.json of `folder`: …/<name>/<version>, or the given `place`. Raises BundleError."""
    if not os.path.lexists(folder / MANIFEST):
        raise BundleError(f"{folder}: no {MANIFEST}")
    try:
        bundle = msgspec.json.decode(contents(opened_in(folder, MANIFEST, MOST_TEXT_BYTES)), type=Bundle)
    except (OSError, msgspec.MsgspecError) as error:
        raise BundleError(f"{folder / MANIFEST}: {error}") from None
    name, version = place or (folder.parent.name, folder.name)
    if (bundle.name, str(bundle.version)) != (name, str(version)):
        said = f"{bundle.name} version {bundle.version}"
        raise BundleError(f"{folder}: {MANIFEST} says {said}, which does not match its folder")
    if missing := {*(v.file for v in bundle.variants), GOLDEN} - bundle.files.keys():
        raise BundleError(f"{folder / MANIFEST}: {min(missing)} is not listed under files")
    return bundle
