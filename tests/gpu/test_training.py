"""Training on a GPU: every kind of problem takes its steps there, and its module comes back to the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from models.entry import Entry, ImageInput
from models.forecasting import Forecaster
from models.training.images import ImageClassification, crop_and_flip, jitter_digits
from models.training.loop import Batch, Problem, TrainingSchedule, fit
from models.training.reber import NextSymbol
from models.training.series import ForecastingProblem, Windows
from models.zoo import catalogue
from rafaga.bundle import ForecastSpec

QUIET = Console(quiet=True)
SCHEDULE = TrainingSchedule(epochs=4, peak_rate=1e-2, weight_decay=0.01, clip_norm=1.0)


@pytest.fixture(scope="session")
def trained_on() -> torch.device:
    device = torch.device(os.environ.get("RAFAGA_TEST_DEVICE", "cuda:0"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: PyTorch finds none")
    return device


def images(entry: Entry) -> ImageClassification:
    """Classes told apart by brightness."""
    spec = entry.input
    assert isinstance(spec, ImageInput)
    assert spec.height
    assert spec.width
    colour = spec.channels == 3
    labels = np.arange(64) % 2
    shape = (64, spec.height, spec.width, *([3] if colour else []))
    pixels = np.random.default_rng(0).integers(0, 60, shape, dtype=np.uint8)
    pixels[labels == 1] += 150
    data, augment = (pixels, labels), crop_and_flip if colour else jitter_digits
    return ImageClassification(entry.build(), spec, data, data, "stripes", augment, batch_size=16, bfloat16=colour)


def forecasts(entry: Entry) -> ForecastingProblem:
    module = entry.build()
    assert isinstance(module, Forecaster)
    assert isinstance(entry.input, ForecastSpec)
    time = np.arange(1500)
    series = (300 + np.sin(time / 3) + np.random.default_rng(0).normal(0, 0.1, len(time))).astype(np.float32)
    return ForecastingProblem(module, entry.input, [series], "waves", Windows(16, 4, jitter=0.1, folds=2))


def symbols(entry: Entry) -> NextSymbol:
    return NextSymbol(entry.build(), batch_size=16, batches_per_epoch=4)


PROBLEMS: dict[str, Callable[[Entry], Problem]] = {
    "lenet5-mnist": images,
    "cnn-mnist": images,
    "resnet20-cifar10": images,
    "plain20-cifar10": images,
    "lstm-co2": forecasts,
    "rnn-co2": forecasts,
    "lstm-sp500": forecasts,
    "lstm-reber": symbols,
}


def problem_of(name: str) -> Problem:
    torch.manual_seed(0)
    return PROBLEMS[name](catalogue()[name])


def mean_loss(problem: Problem) -> float:
    torch.manual_seed(1)
    with torch.inference_mode():
        return float(np.mean([float(problem.loss(batch)) for batch in islice(problem.batches(), 4)]))


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_a_few_steps_are_taken_on_the_device(name: str, trained_on: torch.device, tmp_path: Path) -> None:
    problem = problem_of(name)
    seen = set()
    on_batch = problem.loss

    def loss(batch: Batch) -> torch.Tensor:
        seen.update(part.device.type for part in batch)
        seen.update(parameter.device.type for parameter in problem.module.parameters())
        return on_batch(batch)

    before = mean_loss(problem)
    problem.loss = loss  # type: ignore[method-assign]
    fit(problem, SCHEDULE, tmp_path / "checkpoint.pt", resume=False, console=QUIET, device=trained_on)
    problem.loss = on_batch  # type: ignore[method-assign]
    assert seen == {trained_on.type}
    assert {tensor.device.type for tensor in problem.module.state_dict().values()} == {"cpu"}
    assert mean_loss(problem) < before
    problem.evaluate()


def test_a_run_is_resumed_on_the_device(trained_on: torch.device, tmp_path: Path) -> None:
    whole = problem_of("resnet20-cifar10")
    fit(whole, SCHEDULE, tmp_path / "whole.pt", resume=False, console=QUIET, device=trained_on)

    stopped = problem_of("resnet20-cifar10")
    batches, epochs = stopped.batches, iter(range(SCHEDULE.epochs))

    def stopping() -> object:
        if next(epochs) == 2:
            raise InterruptedError
        return batches()

    stopped.batches = stopping  # type: ignore[method-assign, assignment]
    with pytest.raises(InterruptedError):
        fit(stopped, SCHEDULE, tmp_path / "stopped.pt", resume=False, console=QUIET, device=trained_on)
    resumed = problem_of("resnet20-cifar10")
    torch.manual_seed(99)
    fit(resumed, SCHEDULE, tmp_path / "stopped.pt", resume=True, console=QUIET, device=trained_on)
    # cuDNN may add in another order; a run with other batches or other weights would be far away.
    assert mean_loss(resumed) == pytest.approx(mean_loss(whole), rel=0.05)
