"""`python -m models.training NAME`: trains one model of the catalogue, measures it on held-out data and saves it.

Writes models/weights/NAME.safetensors, and NAME.json with the figures, the command, seed, data and versions.
`python -m models.training forecaster` trains a forecaster of your own series instead.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from models.entry import WEIGHTS
from models.expectation import shortfalls
from models.progress import shown
from models.training import forecaster, run
from models.training.data import DataUnavailable
from models.training.loop import training_device
from models.training.options import add_data_option, add_options
from models.training.recipes import recipes
from models.training.series import ForecastingProblem
from models.zoo import catalogue
from rafaga.errors import DeviceError


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["forecaster"]:
        return forecaster.main(arguments[1:])
    options = new_parser().parse_args(arguments)
    console = Console()
    if options.list or options.name is None:
        console.print(_table())
        return 0
    if options.name not in recipes():
        console.print(f"no recipe for {options.name!r}; known: {', '.join(recipes())}", style="red", markup=False)
        return 2
    try:
        train(options, console)
    except (DataUnavailable, DeviceError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    return 0


def train(options: argparse.Namespace, console: Console) -> None:
    name: str = options.name
    recipe = recipes()[name]
    schedule = replace(recipe.schedule, epochs=options.epochs or recipe.schedule.epochs)
    device = training_device(options.device)
    what = f"{recipe.architecture}, {recipe.dataset}, {schedule.epochs} epochs, seed {options.seed}, on {device}"
    console.print(f"{name}: {what}")
    torch.manual_seed(options.seed)
    with shown(console, name) as steps:
        problem = recipe.problem(options.data, steps)
    with run.one_thread() if isinstance(problem, ForecastingProblem) else nullcontext():
        trained = run.train(problem, schedule, name, options.resume, console, device, recipe.half)
    for shortfall in shortfalls(catalogue()[name], trained.metrics):
        console.print(str(shortfall), style="yellow", markup=False)
    record = run.TrainingRecord(
        name=name,
        architecture=recipe.architecture,
        dataset=recipe.dataset,
        parameters=sum(p.numel() for p in problem.module.parameters()),
        metrics=trained.metrics,
        schedule=schedule,
        chosen=recipe.chosen,
        calibration=trained.calibration,
        command=f"python -m models.training {name} --epochs {schedule.epochs} --seed {options.seed}",
        seed=options.seed,
        epochs=trained.epochs,
        training_seconds=trained.seconds,
        device=device.type,
        dtype="float16" if recipe.half else "float32",
    )
    run.save(problem.module, options.output or WEIGHTS / f"{name}.safetensors", record, console)


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.training",
        description=__doc__.splitlines()[0],
        epilog="Also: python -m models.training forecaster --help (a forecaster of your own series, from a CSV file)",
    )
    parser.add_argument("name", nargs="?", help="the model to train; see --list")
    parser.add_argument("--list", action="store_true", help="print the recipes and exit")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: models/weights/NAME.safetensors")
    add_data_option(parser)
    add_options(parser)
    return parser


def _table() -> Table:
    table = Table("name", "architecture", "data", "epochs")
    for name, recipe in recipes().items():
        table.add_row(name, recipe.architecture, recipe.dataset, str(recipe.schedule.epochs))
    return table


if __name__ == "__main__":
    sys.exit(main())
