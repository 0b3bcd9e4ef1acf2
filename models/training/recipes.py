"""What can be trained here, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from models.forecasting import Forecaster
from models.training.data import Series, load_co2, load_mnist
from models.training.images import ImageClassification, jitter_digits
from models.training.loop import Problem, Schedule
from models.training.series import Forecasting, Windows
from models.zoo import Entry, ImageInput, SeriesInput

# Few and short epochs, a small network and noise: a record of 35 years is soon known by heart.
CO2_SCHEDULE = Schedule(epochs=10, peak_rate=5e-3, weight_decay=0.1, clip_norm=1.0)
CO2_WINDOWS = Windows(batch_size=64, batches_per_epoch=25, jitter=0.1)


@dataclass(frozen=True)
class Recipe:
    """`problem(entry, root)` reads the data below `root` (None: see models.training.data) and builds the module."""

    problem: Callable[[Entry, Path | None], Problem]
    schedule: Schedule
    half: bool = False  # ship the weights as float16


def recipes() -> Mapping[str, Recipe]:
    return {
        "lenet5-mnist": Recipe(digits, Schedule(epochs=40, peak_rate=3e-3, weight_decay=0.01)),
        "lstm-co2": Recipe(partial(forecasting, load=lambda _: load_co2(), drawn=CO2_WINDOWS), CO2_SCHEDULE),
        "rnn-co2": Recipe(partial(forecasting, load=lambda _: load_co2(), drawn=CO2_WINDOWS), CO2_SCHEDULE),
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


def forecasting(entry: Entry, root: Path | None, load: Callable[[Path | None], Series], drawn: Windows) -> Problem:
    module = entry.build()
    assert isinstance(entry.input, SeriesInput)
    assert isinstance(module, Forecaster)
    return Forecasting(module, entry.input, load(root), entry.dataset, drawn)
