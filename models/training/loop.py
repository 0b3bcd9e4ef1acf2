"""The training loop: shuffled batches, a one-cycle schedule, a checkpoint after every epoch.

A resumed run ends in the same weights as an uninterrupted one: the checkpoint holds weights, optimiser, schedule and
the state of the random generators, which nothing else uses. On a GPU this depends on the order of cuDNN's sums. Batches
are drawn and augmented on the CPU, so a seed gives the same batches on every device.
"""

from __future__ import annotations

import copy
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypedDict

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from models.progress import SILENT, Steps
from models.training.calibration import IntervalCalibration
from rafaga.bundle import Metric
from rafaga.errors import DeviceError

Batch = tuple[Tensor, ...]
CPU = torch.device("cpu")


class TrainingDevice(StrEnum):
    AUTO = "auto"  # the first GPU, if there is one
    CPU = "cpu"
    CUDA = "cuda"


class Optimiser(StrEnum):
    ADAMW = "adamw"
    SGD = "sgd"  # Nesterov momentum 0.9


@dataclass(frozen=True)
class TrainingSchedule:
    """The learning rate rises to `peak_rate` during `warmup` of all steps, then falls by a cosine (Smith 2018).

    `patience`: stop early after this many epochs without a lower validation loss, and keep the best epoch's weights.
    `stop_after`: stop after this epoch, with the rates of a run of all `epochs`.
    """

    epochs: int
    peak_rate: float
    weight_decay: float
    optimiser: Optimiser = Optimiser.ADAMW
    warmup: float = 0.15
    clip_norm: float | None = None
    patience: int | None = None
    stop_after: int | None = None


@dataclass(frozen=True)
class Fitted:
    """`epochs`: the one whose weights were kept. `seconds` include those before a resumption."""

    epochs: int
    seconds: float


class Problem(ABC):
    """A model with its data and its loss."""

    module: nn.Module
    batches_per_epoch: int

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """One epoch, shuffled and augmented; all randomness comes from torch's global generator."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of `batch`, a scalar. Module and batch are on the same device."""

    def validation(self) -> Iterator[Batch]:
        """Data that training does not see, for a schedule with `patience`."""
        raise NotImplementedError

    def rehearsals(self) -> Sequence[Problem]:
        """The same problem on parts of its training data; the rest of the data calibrates the model."""
        return ()

    def calibrate(self, rehearsals: Sequence[Problem], steps: Steps = SILENT) -> IntervalCalibration:
        """Fits parameters outside the loss to the errors of the trained `rehearsals` on data that they did not see."""
        raise NotImplementedError

    @abstractmethod
    def evaluate(self, steps: Steps = SILENT) -> tuple[Metric, ...]:
        """Figures on data that training never saw, with the module on the CPU."""


def training_device(wanted: TrainingDevice) -> torch.device:
    """Raises DeviceError if a GPU is requested but missing."""
    if wanted is TrainingDevice.CPU or (wanted is TrainingDevice.AUTO and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError("--device cuda: PyTorch finds no GPU; use --device cpu to train without one")
    return torch.device("cuda", 0)


def fit(
    problem: Problem,
    schedule: TrainingSchedule,
    checkpoint: Path,
    resume: bool,
    console: Console,
    device: torch.device = CPU,
) -> Fitted:
    """Trains `problem.module` in place.

    `resume` continues from `checkpoint` if that file exists; it may come from another device. The module ends on the
    CPU, where it is measured.
    """
    module = problem.module.to(device).train()
    optimiser = _optimiser(module, schedule)
    steps = schedule.epochs * problem.batches_per_epoch
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, schedule.peak_rate, total_steps=steps, pct_start=schedule.warmup, cycle_momentum=False
    )
    epoch, seconds, started = 0, 0.0, time.monotonic()
    best: _Best = {"epoch": 0, "loss": math.inf, "module": {}}
    if resume and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=CPU, weights_only=True)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        rates.load_state_dict(state["rates"])
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        epoch, seconds, best = state["epoch"], state["seconds"], state["best"]
        console.print(f"resumed after epoch {epoch}")
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        console=console,
    ) as progress:
        bar = progress.add_task("training", total=steps, completed=epoch * problem.batches_per_epoch, loss=float("nan"))
        while epoch < (schedule.stop_after or schedule.epochs):
            if schedule.patience is not None and epoch - best["epoch"] >= schedule.patience:
                break
            epoch, total = epoch + 1, 0.0
            for count, batch in enumerate(problem.batches(), start=1):
                loss = problem.loss(tuple(part.to(device) for part in batch))
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                if schedule.clip_norm is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), schedule.clip_norm)
                optimiser.step()
                rates.step()
                total += loss.item()
                progress.update(bar, advance=1, loss=total / count, description=f"epoch {epoch}/{schedule.epochs}")
            if schedule.patience is not None and (found := _validated(problem, device)) < best["loss"]:
                best = {"epoch": epoch, "loss": found, "module": copy.deepcopy(module.state_dict())}
            _save(
                checkpoint,
                {
                    "module": module.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "rates": rates.state_dict(),
                    "rng": torch.get_rng_state(),
                    **({"cuda_rng": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}),
                    "best": best,
                    "epoch": epoch,
                    "seconds": seconds + time.monotonic() - started,
                },
            )
    if best["epoch"]:
        module.load_state_dict(best["module"])
    module.to(CPU).eval()
    return Fitted(best["epoch"] or epoch, seconds + time.monotonic() - started)


class _Best(TypedDict):
    epoch: int  # 0: none yet
    loss: float
    module: dict[str, Tensor]


def _validated(problem: Problem, device: torch.device) -> float:
    with torch.no_grad():
        losses = [problem.loss(tuple(part.to(device) for part in batch)).item() for batch in problem.validation()]
    return sum(losses) / len(losses)


def _optimiser(module: nn.Module, schedule: TrainingSchedule) -> torch.optim.Optimizer:
    # Biases and normalisation are not decayed: pulling them to zero does not regularise.
    weights = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": schedule.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if schedule.optimiser is Optimiser.SGD:
        return torch.optim.SGD(groups, lr=schedule.peak_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=schedule.peak_rate)


def _save(path: Path, state: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(state, temporary)
    temporary.replace(path)  # if the run is killed, its previous checkpoint is intact
