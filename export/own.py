"""A model that is not in the catalogue: `--factory package.module:build` and its description.

The factory is called without arguments and returns an nn.Module. Inputs and outputs by task:

    classification   float32 [N, channels, height, width] -> logits [N, classes], or what --head says
    features         the same -> the named maps [N, C, h, w] or embeddings [N, D], in order
    segmentation     the same -> logits [N, classes, height, width], at the size of the image
    sequence         int64 [N, T], indices into the labels -> logits [N, T, labels] of the next symbol; causal
    forecasting      history float32 [N, T], padded with zeros on the right, and its length int64 [N] -> quantiles
                     float32 [N, horizon, levels], in the unit of the history; padding must not change them

    detection        one of torchvision's detectors: SSD, SSDlite, RetinaNet, FCOS or Faster R-CNN, with any backbone.
                     The module itself says how images are prepared, which scores and overlaps count, and how many
                     objects it gives
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from export.labels import Labels
from export.preprocessing import Preset, preset_of
from models.entry import Entry, ImageInput
from models.training.data import Series
from models.training.forecast_eval import naive_error
from rafaga.bundle import NAME_PATTERN, ForecastSpec, Head, Interpolation, SequenceSpec, Task
from rafaga.evaluation import TEST_FRACTION
from rafaga.series import SeriesError, read_series

# Mean and deviation of ImageNet's channels, with which torchvision's models were trained.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class OwnModelInvalid(Exception):
    """The description of your own model is invalid; the message names the option."""


@dataclass(frozen=True)
class OwnModel:
    """The command line's description. `size` None: the published one, or any height and width, for features and
    segmentation only. `resize_shorter` None: the published one, or 0; 0: images are resized to `size` without cropping.
    """

    factory: str
    name: str
    task: Task
    size: tuple[int, int] | None
    channels: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    normalize: str | None = None  # "imagenet" or "none"
    resize_shorter: int | None = None
    interpolation: Interpolation | None = None
    bgr: bool = False
    exif_orientation: bool = True
    head: Head = Head.LOGITS
    weights: str = "auto"
    labels: Labels | None = None
    strides: Mapping[str, int] | None = None
    dataset: str = "unknown"
    max_length: int | None = None
    forecast: ForecastSpec | None = None
    series: Series | None = None  # what a forecaster is measured on


def own_entry(own: OwnModel) -> Entry:
    """An entry like those of the catalogue. Raises OwnModelInvalid."""
    if not NAME_PATTERN.fullmatch(own.name):
        raise OwnModelInvalid(f"--name {own.name!r}: expected lower-case letters, digits, '_', '.', '-'; at most 63")
    factory = _factory(own.factory)
    _require_what_the_task_needs(own)
    if own.task is Task.DETECTION:
        return _detector_entry(own, _builder(factory, own.factory))
    preset = None if own.channels == 1 or own.max_length is not None else preset_of(factory, own.weights)
    if own.size is None and own.task is Task.CLASSIFICATION and preset is not None:
        own = replace(own, size=preset.size)
    if own.task is Task.CLASSIFICATION and own.size is None:
        raise OwnModelInvalid("--task classification needs a fixed --input-size")
    labels = own.labels.names if own.labels else ()
    return Entry(
        name=own.name,
        architecture=own.factory,
        task=own.task,
        dataset=own.dataset,
        build=_builder(factory, own.factory),
        input=_input(own, preset),
        series=() if own.series is None else (own.series,),
        labels=lambda: labels,
        strides=dict(own.strides or {}),
        head=own.head,
        prepared_as=preset.source if preset else "assumed",
    )


def _detector_entry(own: OwnModel, build: Callable[[], nn.Module]) -> Entry:
    """Builds the detector once to read its limits. Raises OwnModelInvalid."""
    # Not at the top: it imports torchvision, which other models do without.
    from export.detectors import image_input, limits, with_background
    from models.detectors import DetectorInvalid, batched

    try:
        detector = batched(build())
        image = image_input(detector, own.bgr, own.exif_orientation)
        labels = with_background(own.labels.names, detector) if own.labels else ()
    except DetectorInvalid as error:
        raise OwnModelInvalid(f"--task detection: {error}") from None
    return Entry(
        name=own.name,
        architecture=own.factory,
        task=own.task,
        dataset=own.dataset,
        build=lambda: batched(build()),
        input=image,
        labels=lambda: labels,
        detection=limits(detector),
        prepared_as="the detector's own transform",
    )


def _require_what_the_task_needs(own: OwnModel) -> None:
    described = (own.size, own.mean, own.std, own.normalize, own.resize_shorter, own.interpolation)
    if own.task is Task.DETECTION and any(option is not None for option in described):
        raise OwnModelInvalid(
            "--task detection: the detector's own transform sets the size and the pixels; leave out --input-size, "
            "--resize-shorter, --interpolation, --normalize, --mean and --std"
        )
    heads = {Task.CLASSIFICATION: tuple(Head), Task.SEGMENTATION: (Head.LOGITS, Head.PROBABILITIES)}
    if own.head not in heads.get(own.task, (Head.LOGITS,)):
        raise OwnModelInvalid(f"--head {own.head} is not for --task {own.task}")
    if own.task is Task.FEATURES and not own.strides:
        raise OwnModelInvalid("--task features needs --maps NAME:STRIDE,... in the order of the model's outputs")
    if own.task is Task.SEQUENCE and (own.labels is None or own.max_length is None):
        raise OwnModelInvalid("--task sequence needs --labels FILE, its symbols, and --max-length")
    if own.task is not Task.SEQUENCE and own.max_length is not None:
        raise OwnModelInvalid("--max-length is for --task sequence")
    if own.task is not Task.FORECASTING and (own.forecast or own.series is not None):
        raise OwnModelInvalid("--horizon, --min-history, --max-history and --eval-series are for --task forecasting")
    if own.task is Task.FORECASTING:
        _require_forecaster(own)


def _require_forecaster(own: OwnModel) -> None:
    if own.forecast is None:
        raise OwnModelInvalid("--task forecasting needs --horizon, --min-history and --max-history")
    spec, levels = own.forecast, own.forecast.quantile_levels
    if 0.5 not in levels or sorted(set(levels)) != list(levels) or not 0 < levels[0] <= levels[-1] < 1:
        raise OwnModelInvalid("--quantiles: expected ascending levels between 0 and 1, 0.5 among them")
    if not spec.season <= spec.min_history <= spec.max_history:
        raise OwnModelInvalid("expected --season <= --min-history <= --max-history")
    # The last fifth must hold a horizon, and the part before it a history.
    needed = max(5 * spec.max_horizon, math.ceil(spec.min_history / (1 - TEST_FRACTION)), 5 * spec.season // 4 + 2)
    if own.series is not None and len(own.series) < needed:
        raise OwnModelInvalid(f"--eval-series: {len(own.series)} observations; expected at least {needed}")
    if own.series is not None and naive_error(own.series, spec.season) == 0:
        raise OwnModelInvalid("--eval-series repeats itself exactly in its first four fifths: errors have no unit")


def read_own_series(text: str) -> Series:
    """ "FILE" or "FILE:COLUMN". Raises OwnModelInvalid."""
    path, _, column = (text, "", "") if Path(text).is_file() else text.rpartition(":")
    try:
        with Path(path or text).open(encoding="utf-8-sig", newline="") as file:
            return np.array(read_series(file, column or None), dtype=np.float32)
    except OSError as error:
        raise OwnModelInvalid(f"--eval-series {path or text}: {error.strerror or error}") from error
    except SeriesError as error:
        reason = str(error).replace("choose a column with --column", "choose a column with FILE:COLUMN")
        raise OwnModelInvalid(f"--eval-series {path or text}: {reason}") from error


def assumptions(entry: Entry, labels: Sequence[str], named: bool) -> list[str]:
    """What the export took for granted, so that you can check it. `named`: `labels` are those of the user."""
    lines = []
    if isinstance(image := entry.input, ImageInput):
        size = f"{image.height} x {image.width}" if image.height else "any size,"
        how = "" if image.height is None else f", resized to it without cropping ({image.interpolation})"
        if image.resize_shorter is not None:
            whose = f"an image whose shorter side is resized to {image.resize_shorter} ({image.interpolation})"
            most = f" and the longer at most {image.max_longer}" if image.max_longer else ""
            how = f", the centre of {whose}" if image.height else f" of {whose}{most}"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (image.mean, image.std))
        colours = ("BGR" if image.bgr else "RGB") if image.channels == 3 else "grey"
        lines += [f"input: {size} {colours}{how}", f"pixels in 0..1, minus the mean {mean}, divided by {std}"]
        lines += [f"size, interpolation and pixels: {entry.prepared_as}, where no option gives them"]
    if not named and labels:
        published = "COCO's" if entry.task is Task.DETECTION else "ImageNet's"
        numbers = f"the class numbers 0 to {len(labels) - 1}"
        what = numbers if labels[0] == "0" else f"{published}, as torchvision lists them"
        lines += [f"labels: {what}; to name the classes: --labels FILE"]
    return lines


def _input(own: OwnModel, preset: Preset | None) -> ImageInput | ForecastSpec | SequenceSpec:
    if own.max_length is not None:
        return SequenceSpec(max_length=own.max_length)
    return own.forecast or _image_input(own, preset)


def _image_input(own: OwnModel, preset: Preset | None) -> ImageInput:
    if own.normalize is not None and (own.mean or own.std):
        raise OwnModelInvalid("--normalize sets the mean and the deviation: give it, or --mean and --std")
    if own.normalize == "imagenet" and own.channels != 3:
        raise OwnModelInvalid(f"--normalize imagenet is for 3 channels, the model takes {own.channels}")
    imagenet = own.normalize != "none" and own.channels == 3
    published = preset if own.normalize is None and not (own.mean or own.std) else None
    mean = own.mean or (published.mean if published else IMAGENET_MEAN if imagenet else (0.0,) * own.channels)
    std = own.std or (published.std if published else IMAGENET_STD if imagenet else (1.0,) * own.channels)
    if not len(mean) == len(std) == own.channels or not all(value > 0 for value in std):
        raise OwnModelInvalid(f"--mean and --std: expected {own.channels} numbers each, the deviations above 0")
    height, width = own.size or (None, None)
    if own.resize_shorter and (height is None or width is None or own.resize_shorter < max(height, width)):
        raise OwnModelInvalid("--resize-shorter must be at least --input-size, which is cropped from the centre")
    if own.bgr and own.channels != 3:
        raise OwnModelInvalid(f"--layout bgr is for 3 channels, the model takes {own.channels}")
    shorter = own.resize_shorter
    if shorter is None and preset is not None:
        if own.size is not None and own.task is not Task.SEGMENTATION:  # which needs the whole image
            shorter = preset.shorter_for(own.size)
        elif own.size is None and own.task is Task.SEGMENTATION:
            shorter = preset.resize_shorter
    interpolation = own.interpolation or (preset.interpolation if preset else Interpolation.BILINEAR)
    return ImageInput(
        height,
        width,
        own.channels,
        mean,
        std,
        shorter or None,
        interpolation=interpolation,
        bgr=own.bgr,
        exif_orientation=own.exif_orientation,
    )


def _factory(path: str) -> Callable[[], object]:
    match = re.fullmatch(r"([\w.]+):([\w.]+)", path)
    if match is None:
        raise OwnModelInvalid(f"--factory {path!r}: expected package.module:function")
    try:
        found: object = importlib.import_module(match[1])
        for attribute in match[2].split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise OwnModelInvalid(f"--factory {path}: {error}") from error
    if not callable(found):
        raise OwnModelInvalid(f"--factory {path}: not a function or a class")
    return found


def _builder(factory: Callable[[], object], path: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module = factory()
        if not isinstance(module, nn.Module):
            raise OwnModelInvalid(f"--factory {path}: expected a torch.nn.Module, got {type(module).__name__}")
        return module

    return build


def size_of(text: str) -> tuple[int, int] | None:
    """ "224", "480x640" (height, width) or "any". Raises ValueError."""
    if text == "any":
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None or int(match[1]) < 1:
        raise ValueError(f"expected 224, 480x640 (height x width) or any, got {text}")
    return int(match[1]), int(match[2] or match[1])


def numbers_of(text: str) -> tuple[float, ...]:
    """ "0.485,0.456,0.406". Raises ValueError."""
    return tuple(float(word) for word in text.split(","))


def strides_of(text: str) -> dict[str, int]:
    """ "c3:8,c4:16". Raises ValueError."""
    pairs = [word.rpartition(":") for word in text.split(",")]
    if not all(name.isidentifier() for name, _, _ in pairs):
        raise ValueError(f"expected NAME:STRIDE,..., got {text}")
    return {name: int(stride) for name, _, stride in pairs}
