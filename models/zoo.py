"""The registry: every architecture that can be exported, with its data, its weights and what it must reach.

`python -m export --list` prints this table. An entry builds an untrained module; `load_weights` then fills it.
torchvision is imported when the catalogue is asked for, never before, and nothing is downloaded here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import nn

from models.entry import (
    WEIGHTS,
    Corpus,
    Entry,
    ImageInput,
    SeriesInput,
    Shipped,
    Task,
    Torchvision,
)
from models.loading import WeightsError, WeightsMismatch, WeightsUnavailable, load_weights

__all__ = [
    "WEIGHTS",
    "Corpus",
    "Entry",
    "ImageInput",
    "SeriesInput",
    "Shipped",
    "Task",
    "Torchvision",
    "WeightsError",
    "WeightsMismatch",
    "WeightsUnavailable",
    "catalogue",
    "load_weights",
]

DIGITS = tuple("0123456789")
DIGIT_INPUT = ImageInput(height=28, width=28, channels=1, mean=(0.0,), std=(1.0,))  # zero is the background
CIFAR_INPUT = ImageInput(height=32, width=32, channels=3, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
CO2_INPUT = SeriesInput(
    min_history=24, max_history=480, max_horizon=24, quantile_levels=QUANTILES, season=12, step="month", unit="ppm"
)


def catalogue() -> Mapping[str, Entry]:
    """Every model by name, in the order of the table that people see."""
    return {entry.name: entry for entry in (*_digits(), *_photos(), *_forecasters(), *_imagenet_classifiers())}


def _digits() -> Iterator[Entry]:
    from models.cnn import DigitCNN
    from models.lenet import LeNet5

    yield Entry(
        name="lenet5-mnist",
        architecture="LeNet-5 (LeCun et al. 1998)",
        task=Task.CLASSIFICATION,
        dataset="MNIST",
        build=LeNet5,
        input=DIGIT_INPUT,
        weights=Shipped("lenet5-mnist.safetensors"),
        labels=lambda: DIGITS,
        corpus=Corpus.MNIST,
        expected={"top1": 0.990},
    )
    yield Entry(
        name="cnn-mnist",
        architecture="CNN: two convolutions and two dense layers",
        task=Task.CLASSIFICATION,
        dataset="MNIST",
        build=DigitCNN,
        input=DIGIT_INPUT,
        weights=Shipped("cnn-mnist.safetensors"),
        labels=lambda: DIGITS,
        corpus=Corpus.MNIST,
        expected={"top1": 0.992},
    )


def _photos() -> Iterator[Entry]:
    from models.cifar_resnet import CifarConfig, CifarResNet
    from models.training.data import CIFAR10_CLASSES

    published = {20: 0.9125, 56: 0.9303}  # He et al., table 6, on the original images
    for depth in (20, 56):
        for residual in (True, False):
            name = f"{'resnet' if residual else 'plain'}{depth}-cifar10"
            yield Entry(
                name=name,
                architecture=f"{'ResNet' if residual else 'Plain'}-{depth} for CIFAR (He et al. 2016)",
                task=Task.CLASSIFICATION,
                dataset="CIFAR-10",
                build=partial(CifarResNet, CifarConfig(depth, residual)),
                input=CIFAR_INPUT,
                weights=Shipped(f"{name}.safetensors"),
                labels=lambda: CIFAR10_CLASSES,
                corpus=Corpus.CIFAR10,
                expected={"top1": published[depth]} if residual else {},
            )


def _forecasters() -> Iterator[Entry]:
    from models.forecasting import Cell, Forecaster, ForecasterConfig

    for cell, name in ((Cell.LSTM, "lstm-co2"), (Cell.RNN, "rnn-co2")):
        config = ForecasterConfig(
            cell=cell,
            hidden=16,
            season=CO2_INPUT.season,
            max_horizon=CO2_INPUT.max_horizon,
            quantile_levels=QUANTILES,
            drift=True,
        )
        yield Entry(
            name=name,
            architecture=_recurrent(cell),
            task=Task.FORECASTING,
            dataset="CO2 at Mauna Loa, monthly",
            build=partial(Forecaster, config),
            input=CO2_INPUT,
            weights=Shipped(f"{name}.safetensors"),
            corpus=Corpus.CO2,
            expected={"mase": 1.0},
        )


def _recurrent(cell: str) -> str:
    return f"{cell.upper()} with a multi-horizon quantile head (after Wen et al. 2017)"


def _imagenet_classifiers() -> Iterator[Entry]:
    from torchvision import models

    yield _imagenet("resnet50", "ResNet-50 (He et al. 2016)", models.resnet50, "ResNet50_Weights.IMAGENET1K_V2")


def _imagenet(name: str, architecture: str, build: Callable[[], nn.Module], member: str) -> Entry:
    """A classifier whose input, labels and accuracy are those of its published weights."""
    from torchvision.models import get_weight

    weights = get_weight(member)
    published = weights.meta["_metrics"]["ImageNet-1K"]
    return Entry(
        name=name,
        architecture=architecture,
        task=Task.CLASSIFICATION,
        dataset="ImageNet-1k",
        build=build,
        input=_image_input(member),
        weights=Torchvision(member),
        labels=lambda: tuple(weights.meta["categories"]),
        expected={"top1": published["acc@1"] / 100, "top5": published["acc@5"] / 100},
    )


def _image_input(member: str) -> ImageInput:
    """The preparation that the weights were measured with."""
    from torchvision.models import get_weight

    preset = get_weight(member).transforms()
    (crop,), (resize,) = preset.crop_size, preset.resize_size
    return ImageInput(
        height=crop, width=crop, channels=3, mean=tuple(preset.mean), std=tuple(preset.std), resize_shorter=resize
    )
