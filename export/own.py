"""A model that is not in the catalogue: `--factory package.module:build` and what must be known of it.

The factory is called without arguments and returns an nn.Module: for classification one that takes float32
[N, channels, height, width] and gives logits [N, classes], for features one that gives the named maps in order.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from export.labels import Labels
from models.entry import Entry, ImageInput, Task
from rafaga.bundle import NAME_PATTERN

# What torchvision's models were trained with; the mean and deviation of ImageNet's channels.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class OwnModelInvalid(Exception):
    """The description of one's own model does not make sense; the message says which part."""


@dataclass(frozen=True)
class OwnModel:
    """The command line's description. `size` None: any height and width, for features alone."""

    factory: str
    name: str
    task: Task
    size: tuple[int, int] | None
    channels: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize_shorter: int | None = None
    labels: Labels | None = None
    strides: Mapping[str, int] | None = None
    dataset: str = "unknown"


def own_entry(own: OwnModel) -> Entry:
    """An entry like those of the catalogue. Raises OwnModelInvalid."""
    if not NAME_PATTERN.fullmatch(own.name):
        raise OwnModelInvalid(f"--name {own.name!r}: expected lower-case letters, digits, '_', '.', '-'; at most 63")
    if own.task is Task.CLASSIFICATION and (own.labels is None or own.size is None):
        raise OwnModelInvalid("--task classification needs --labels FILE and a fixed --input-size")
    if own.task is Task.FEATURES and not own.strides:
        raise OwnModelInvalid("--task features needs --maps NAME:STRIDE,... in the order in which the model gives them")
    if own.task not in (Task.CLASSIFICATION, Task.FEATURES):
        raise OwnModelInvalid("--task: expected classification or features")
    imagenet = own.channels == 3
    mean = own.mean or (IMAGENET_MEAN if imagenet else (0.0,) * own.channels)
    std = own.std or (IMAGENET_STD if imagenet else (1.0,) * own.channels)
    if not len(mean) == len(std) == own.channels or not all(value > 0 for value in std):
        raise OwnModelInvalid(f"--mean and --std: expected {own.channels} numbers each, the deviations above 0")
    height, width = own.size or (None, None)
    if own.resize_shorter is not None and (height is None or width is None or own.resize_shorter < max(height, width)):
        raise OwnModelInvalid("--resize-shorter must be at least --input-size, which is then cropped from the centre")
    labels = own.labels.names if own.labels else ()
    return Entry(
        name=own.name,
        architecture=own.factory,
        task=own.task,
        dataset=own.dataset,
        build=_factory(own.factory),
        input=ImageInput(height, width, own.channels, mean, std, own.resize_shorter),
        labels=lambda: labels,
        strides=dict(own.strides or {}),
    )


def _factory(path: str) -> Callable[[], nn.Module]:
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
    factory = found

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
