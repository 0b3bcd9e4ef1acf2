"""The training recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from models.entry import Entry, ImageInput
from models.forecasting import Forecaster
from models.progress import Steps
from models.training.data import (
    Series,
    cifar10_name,
    load_cifar10,
    load_co2,
    load_etth1,
    load_mnist,
    load_sp500,
    mnist_name,
)
from models.training.images import ImageClassification, crop_and_flip, jitter_digits
from models.training.loop import Optimiser, Problem, TrainingSchedule
from models.training.reber import NextSymbol
from models.training.series import ForecastingProblem, Windows
from models.zoo import catalogue
from rafaga.bundle import ForecastSpec

# Few and short epochs, a small network and noise: a network overfits a record of 35 years quickly.
CO2_SCHEDULE = TrainingSchedule(epochs=10, peak_rate=5e-3, weight_decay=0.1, clip_norm=1.0)
CO2_WINDOWS = Windows(batch_size=64, batches_per_epoch=25, jitter=0.1, folds=8)
LONG_SCHEDULE = TrainingSchedule(epochs=10, peak_rate=5e-3, weight_decay=0.05, clip_norm=1.0)
LONG_WINDOWS = Windows(batch_size=64, batches_per_epoch=40, jitter=0.05, folds=3)
ETT_SCHEDULE = replace(LONG_SCHEDULE, peak_rate=2e-3)
ETT_WINDOWS = replace(LONG_WINDOWS, full=0.5)
ETT_CHOSEN = (
    "on the last fifth of the training part, seed 0: MASE 0.493 (Holt-Winters 0.515); without the linear forecast "
    "and with a rate of 5e-3: 0.527"
)

CIFAR_NETWORKS = ("resnet20-cifar10", "plain20-cifar10", "resnet56-cifar10", "plain56-cifar10")
CIFAR_SCHEDULE = TrainingSchedule(epochs=20, peak_rate=0.2, weight_decay=5e-4, optimiser=Optimiser.SGD, warmup=0.25)


@dataclass(frozen=True)
class Recipe:
    """`problem(root, steps)` reads the data below `root` (None: see models.training.data) and builds the module."""

    architecture: str
    dataset: str
    problem: Callable[[Path | None, Steps], Problem]
    schedule: TrainingSchedule
    half: bool = False  # ship the weights as float16
    chosen: str = ""  # how it was chosen, and on which data


def recipes() -> Mapping[str, Recipe]:
    entries = catalogue()

    def recipe(
        name: str,
        problem: Callable[[Entry, Path | None, Steps], Problem],
        schedule: TrainingSchedule,
        half: bool = False,
        chosen: str = "",
    ) -> tuple[str, Recipe]:
        entry = entries[name]
        return name, Recipe(entry.architecture, entry.dataset, partial(problem, entry), schedule, half, chosen)

    co2 = partial(forecasting, load=lambda _: load_co2(), drawn=CO2_WINDOWS)
    return dict(
        (
            recipe("lenet5-mnist", digits, TrainingSchedule(epochs=40, peak_rate=3e-3, weight_decay=0.01)),
            recipe("cnn-mnist", digits, TrainingSchedule(epochs=20, peak_rate=1e-3, weight_decay=0.05), half=True),
            *(recipe(name, photos, CIFAR_SCHEDULE) for name in CIFAR_NETWORKS),
            recipe("lstm-co2", co2, CO2_SCHEDULE),
            recipe("rnn-co2", co2, replace(CO2_SCHEDULE, epochs=20)),
            recipe(
                "lstm-ett",
                partial(forecasting, load=load_etth1, drawn=ETT_WINDOWS),
                ETT_SCHEDULE,
                chosen=ETT_CHOSEN,
            ),
            recipe("lstm-sp500", partial(forecasting, load=load_sp500, drawn=LONG_WINDOWS), LONG_SCHEDULE),
            recipe(
                "lstm-reber", next_symbol, TrainingSchedule(epochs=15, peak_rate=1e-2, weight_decay=0.0, clip_norm=1.0)
            ),
        )
    )


def digits(entry: Entry, root: Path | None, _: Steps) -> Problem:
    assert isinstance(entry.input, ImageInput)
    return ImageClassification(
        entry.build(),
        entry.input,
        training=load_mnist(root, train=True),
        held_out=load_mnist(root, train=False),
        held_out_name=mnist_name(root, train=False),
        augment=jitter_digits,
        batch_size=128,
    )


def photos(entry: Entry, root: Path | None, steps: Steps) -> Problem:
    assert isinstance(entry.input, ImageInput)
    return ImageClassification(
        entry.build(),
        entry.input,
        training=load_cifar10(root, train=True, steps=steps),
        held_out=load_cifar10(root, train=False, steps=steps),
        held_out_name=cifar10_name(root, train=False),
        augment=crop_and_flip,
        batch_size=128,
        bfloat16=True,
    )


def next_symbol(entry: Entry, _: Path | None, __: Steps) -> Problem:
    return NextSymbol(entry.build(), batch_size=32, batches_per_epoch=100)


def forecasting(
    entry: Entry, root: Path | None, _: Steps, load: Callable[[Path | None], Series], drawn: Windows
) -> Problem:
    module = entry.build()
    assert isinstance(entry.input, ForecastSpec)
    assert isinstance(module, Forecaster)
    return ForecastingProblem(module, entry.input, [load(root)], entry.dataset, drawn)
