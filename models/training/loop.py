"""The one training loop: shuffled batches, a one-cycle schedule, a checkpoint after every epoch.

A run that is stopped and resumed ends in the same weights as one that was not: the checkpoint holds weights, optimiser,
schedule and the state of the random generator, and nothing else draws from it.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from rafaga.bundle import Metric

Batch = tuple[Tensor, ...]


class Optimiser(StrEnum):
    ADAMW = "adamw"
    SGD = "sgd"  # Nesterov momentum 0.9


@dataclass(frozen=True)
class Schedule:
    """Learning rate `peak_rate` reached after `warmup` of all steps, then a cosine down to nothing (Smith 2018)."""

    epochs: int
    peak_rate: float
    weight_decay: float
    optimiser: Optimiser = Optimiser.ADAMW
    warmup: float = 0.15
    clip_norm: float | None = None


class Problem(ABC):
    """A model with its data and its loss: everything that the loop does not know."""

    module: nn.Module
    batches_per_epoch: int

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """One epoch, shuffled and augmented; randomness comes from torch's global generator alone."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of `batch`, a scalar."""

    def rehearsals(self) -> Sequence[Problem]:
        """The same problem on parts of its training data, for recipes that are calibrated on the rest of it."""
        return ()

    def calibrate(self, rehearsals: Sequence[Problem]) -> None:
        """Fits what the loss does not, to what the trained `rehearsals` get wrong on data that they did not see."""
        raise NotImplementedError

    @abstractmethod
    def evaluate(self) -> tuple[Metric, ...]:
        """Figures on data that training never saw."""


def fit(problem: Problem, schedule: Schedule, checkpoint: Path, resume: bool, console: Console) -> float:
    """Trains `problem.module` in place and returns the seconds it took, those before a resumption included.

    `resume` continues from `checkpoint` where that file exists.
    """
    module = problem.module.train()
    optimiser = _optimiser(module, schedule)
    steps = schedule.epochs * problem.batches_per_epoch
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, schedule.peak_rate, total_steps=steps, pct_start=schedule.warmup, cycle_momentum=False
    )
    epoch, seconds, started = 0, 0.0, time.monotonic()
    if resume and checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        rates.load_state_dict(state["rates"])
        torch.set_rng_state(state["rng"])
        epoch, seconds = state["epoch"], state["seconds"]
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
        for epoch in range(epoch + 1, schedule.epochs + 1):  # noqa: B020  # continues where the checkpoint ended
            total = 0.0
            for count, batch in enumerate(problem.batches(), start=1):
                loss = problem.loss(batch)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                if schedule.clip_norm is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), schedule.clip_norm)
                optimiser.step()
                rates.step()
                total += loss.item()
                progress.update(bar, advance=1, loss=total / count, description=f"epoch {epoch}/{schedule.epochs}")
            _save(
                checkpoint,
                {
                    "module": module.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "rates": rates.state_dict(),
                    "rng": torch.get_rng_state(),
                    "epoch": epoch,
                    "seconds": seconds + time.monotonic() - started,
                },
            )
    module.eval()
    return seconds + time.monotonic() - started


def _optimiser(module: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    # Biases and normalisation are not decayed: pulling them to zero regularises nothing.
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
    temporary.replace(path)  # a run killed here keeps its previous checkpoint
