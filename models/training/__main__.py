"""`python -m models.training NAME`: trains one model of the catalogue, measures it on held-out data and saves it.

Writes models/weights/NAME.safetensors, and NAME.json with the figures, the command, seed, data and versions.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from models.entry import WEIGHTS
from models.expectation import shortfalls
from models.progress import shown
from models.training.data import DataUnavailable
from models.training.loop import fit, training_device
from models.training.options import CHECKPOINTS, add_options
from models.training.recipes import recipes
from models.zoo import catalogue
from rafaga.bundle import Metric, sha256_of
from rafaga.errors import DeviceError


class TrainingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """NAME.json: the figures, and how to reproduce them."""

    name: str
    architecture: str
    dataset: str
    parameters: int
    metrics: tuple[Metric, ...]
    command: str
    seed: int
    epochs: int
    training_seconds: float
    device: str
    created: str
    torch: str
    dtype: str
    sha256: str


def main(arguments: list[str] | None = None) -> int:
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
    epochs = options.epochs or recipe.schedule.epochs
    output: Path = options.output or WEIGHTS / f"{name}.safetensors"
    device = training_device(options.device)
    console.print(f"{name}: {recipe.architecture}, {recipe.dataset}, {epochs} epochs, seed {options.seed}, on {device}")

    torch.manual_seed(options.seed)
    with shown(console, name) as steps:
        problem = recipe.problem(options.data, steps)
    schedule = replace(recipe.schedule, epochs=epochs)
    seconds = fit(problem, schedule, CHECKPOINTS / f"{name}.pt", options.resume, console, device)
    rehearsals = problem.rehearsals()
    for number, rehearsal in enumerate(rehearsals, start=1):
        console.print(f"calibrating {number}/{len(rehearsals)}: training without one block of the data, testing on it")
        seconds += fit(rehearsal, schedule, CHECKPOINTS / f"{name}-{number}.pt", options.resume, console, device)
    with shown(console, name) as steps:
        if rehearsals:
            problem.calibrate(rehearsals, steps)
        if recipe.half:  # measured as shipped, rounded
            problem.module.half().float()
        metrics = problem.evaluate(steps)
    for metric in metrics:
        console.print(f"{metric.name:>24} {metric.value:.4f}  {metric.dataset}, {metric.samples} samples")
    for shortfall in shortfalls(catalogue()[name], metrics):
        console.print(str(shortfall), style="yellow", markup=False)

    state = {key: value.contiguous() for key, value in problem.module.state_dict().items()}
    if recipe.half:
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, output)
    output.chmod(0o644)  # safetensors creates a private file
    record = TrainingRecord(
        name=name,
        architecture=recipe.architecture,
        dataset=recipe.dataset,
        parameters=sum(p.numel() for p in problem.module.parameters()),
        metrics=metrics,
        command=f"python -m models.training {name} --epochs {epochs} --seed {options.seed}",
        seed=options.seed,
        epochs=epochs,
        training_seconds=round(seconds, 1),
        device=device.type,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        torch=str(torch.__version__),
        dtype="float16" if recipe.half else "float32",
        sha256=sha256_of(output),
    )
    output.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
    console.print(f"saved {output} ({output.stat().st_size:,} bytes)")


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.training", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="the model to train; see --list")
    parser.add_argument("--list", action="store_true", help="print the recipes and exit")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: models/weights/NAME.safetensors")
    add_options(parser)
    return parser


def _table() -> Table:
    table = Table("name", "architecture", "data", "epochs")
    for name, recipe in recipes().items():
        table.add_row(name, recipe.architecture, recipe.dataset, str(recipe.schedule.epochs))
    return table


if __name__ == "__main__":
    sys.exit(main())
