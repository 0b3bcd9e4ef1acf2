"""`python -m models.training.degradation`: the effect of shortcuts (He et al. 2016, section 4.2 and figure 6).

Trains the plain and the residual CIFAR networks of 20 and 56 layers by the same recipe and compares their errors:
without shortcuts the deeper network is worse than the shallow one, and worse than the residual network of its depth.
Takes hours on a CPU; `--epochs 1` is shorter, and `--networks plain20-cifar10 resnet20-cifar10` shorter still. Exit
code 0 if every claim about the chosen networks holds, 1 if one does not or the data are not available.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from models.progress import shown
from models.training.data import DataUnavailable
from models.training.loop import fit, training_device
from models.training.options import CHECKPOINTS, add_data_option, add_options
from models.training.recipes import CIFAR_NETWORKS, recipes
from rafaga.errors import DeviceError

# Better, worse.
CLAIMS = (
    ("plain20-cifar10", "plain56-cifar10"),
    ("resnet56-cifar10", "plain56-cifar10"),
    ("resnet20-cifar10", "plain20-cifar10"),
)


@dataclass(frozen=True)
class Claim:
    """One network of the paper's figure is better than another; `points`: the measured difference in top-1."""

    better: str
    worse: str
    points: float

    @property
    def holds(self) -> bool:
        return self.points > 0


def claims(top1: Mapping[str, float]) -> Iterator[Claim]:
    """The claims about the networks in `top1`, the share of correct test photos by name."""
    for better, worse in CLAIMS:
        if better in top1 and worse in top1:
            yield Claim(better, worse, 100 * (top1[better] - top1[worse]))


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        top1 = compare(options, console)
    except (DataUnavailable, DeviceError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    console.print(_table(top1))
    found = list(claims(top1))
    for claim in found:
        verdict = "[green]holds[/green]" if claim.holds else "[red]does not hold[/red]"
        console.print(f"{claim.better} better than {claim.worse}: {claim.points:+.2f} points, {verdict}")
    return 0 if all(claim.holds for claim in found) else 1


def compare(options: argparse.Namespace, console: Console) -> dict[str, float]:
    """Top-1 on the test photos by network, each trained from the same seed. Raises DataUnavailable, DeviceError."""
    on = training_device(options.device)
    top1 = {}
    for name in options.networks:
        recipe = recipes()[name]
        schedule = replace(recipe.schedule, epochs=options.epochs or recipe.schedule.epochs)
        console.print(f"{name}: {schedule.epochs} epochs, seed {options.seed}, on {on}")
        torch.manual_seed(options.seed)
        with shown(console, name) as steps:
            problem = recipe.problem(options.data, steps)
        fit(problem, schedule, CHECKPOINTS / f"degradation-{name}.pt", options.resume, console, on)
        with shown(console, name) as steps:
            (metric,) = problem.evaluate(steps)
        top1[name] = metric.value
    return top1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m models.training.degradation", description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=CIFAR_NETWORKS, default=CIFAR_NETWORKS, metavar="NAME")
    add_data_option(parser)
    add_options(parser)
    return parser


def _table(top1: Mapping[str, float]) -> Table:
    table = Table("network", "test error, %")
    for name, share in top1.items():
        table.add_row(name, f"{100 * (1 - share):.2f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
