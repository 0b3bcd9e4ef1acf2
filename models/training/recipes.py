"""What can be trained here, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from models.training.data import load_mnist
from models.training.images import ImageClassification, jitter_digits
from models.training.loop import Problem, Schedule
from models.zoo import Entry, ImageInput


@dataclass(frozen=True)
class Recipe:
    """`problem(entry, root)` reads the data below `root` (None: see models.training.data) and builds the module."""

    problem: Callable[[Entry, Path | None], Problem]
    schedule: Schedule
    half: bool = False  # ship the weights as float16


def recipes() -> Mapping[str, Recipe]:
    return {
        "lenet5-mnist": Recipe(digits, Schedule(epochs=40, peak_rate=3e-3, weight_decay=0.01)),
        "cnn-mnist": Recipe(digits, Schedule(epochs=20, peak_rate=1e-3, weight_decay=0.05), half=True),
    }


def digits(entry: Entry, root: Path | None) -> Problem:
    assert isinstance(entry.input, ImageInput)
    return ImageClassification(
        entry.build(),
        entry.input,
        training=load_mnist(root, train=True),
        held_out=load_mnist(root, train=False),
        held_out_name="MNIST test",
        augment=jitter_digits,
        batch_size=128,
    )
