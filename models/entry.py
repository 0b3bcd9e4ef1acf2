"""The types of the catalogue's entries.

An entry builds an untrained module; `models.loading` loads the weights, so that building never reads a file or the
network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from rafaga.bundle import DetectionSpec, ForecastSpec, Head, Interpolation, SequenceSpec, Task

WEIGHTS = Path(__file__).parent / "weights"


class Corpus(StrEnum):
    """Data that `models.training.data` can load."""

    MNIST = "mnist"
    CIFAR10 = "cifar10"
    CO2 = "co2"
    ETTH1 = "etth1"
    SP500 = "sp500"
    REBER = "reber"


@dataclass(frozen=True)
class ImageInput:
    """Input of a vision module: float32 [N, channels, height, width], normalised as (x/255 - mean) / std.

    `height` and `width` None: any size (backbones). `resize_shorter`: the shorter side of an encoded image is resized
    to this many pixels before the centre crop; None resizes to exactly height x width. `max_longer`: limit of the
    longer side when resizing. `bgr`: the module takes the channels in reverse order. `exif_orientation`: photos are
    turned upright as their EXIF data says.
    """

    height: int | None
    width: int | None
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_shorter: int | None = None
    max_longer: int | None = None
    interpolation: Interpolation = Interpolation.BILINEAR
    bgr: bool = False
    exif_orientation: bool = True


@dataclass(frozen=True)
class Shipped:
    """A safetensors file in models/weights, trained by `python -m models.training NAME`."""

    file: str
    license: str = "Apache-2.0"

    @property
    def path(self) -> Path:
        return WEIGHTS / self.file


@dataclass(frozen=True)
class Trained:
    """A safetensors file that `command` wrote; its record is next to it, with the suffix .json."""

    path: Path
    command: str


@dataclass(frozen=True)
class Torchvision:
    """A member of one of torchvision's weight enums, e.g. "ResNet50_Weights.IMAGENET1K_V2"."""

    member: str
    license: str = "BSD-3-Clause (torchvision); trained on ImageNet-1k, whose terms apply"


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue."""

    name: str
    architecture: str  # with its source: "LeNet-5 (LeCun et al. 1998)"
    task: Task
    dataset: str
    build: Callable[[], nn.Module]
    input: ImageInput | ForecastSpec | SequenceSpec
    weights: Shipped | Trained | Torchvision | None = None
    labels: Callable[[], tuple[str, ...]] = tuple
    # Its data in `models.training.data`, to measure accuracy and to calibrate int8; None if there are none.
    corpus: Corpus | None = None
    # Forecasters of your own only, float32 [T] each: what they are measured on.
    series: tuple[npt.NDArray[np.float32], ...] = ()
    # Their covariates, float32 [T, C] each; empty without any.
    covariates: tuple[npt.NDArray[np.float32], ...] = ()
    # Output names in the module's order, with the stride of each map (0: an embedding); features only.
    strides: Mapping[str, int] = field(default_factory=dict)
    # Detection only.
    detection: DetectionSpec | None = None
    # Published or required figures by metric name, e.g. {"top1": 0.99}.
    expected: Mapping[str, float] = field(default_factory=dict)
    # The reason if `expected` is empty.
    unpromised: str = ""
    # What a classifier or a segmenter gives.
    head: Head = Head.LOGITS
    # Of your own model: whose metadata describe its preparation of images, or "assumed".
    prepared_as: str = ""
