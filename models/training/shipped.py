"""Forecasts of the shipped forecasters on the last fifth of their series, for the commands that evaluate them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from models.entry import Shipped
from models.loading import load_weights
from models.progress import SILENT, Steps, shown
from models.training.data import DataUnavailable, Series
from models.training.forecast_eval import Origins, held_out, quantiles_of
from models.training.recipes import recipes
from models.training.series import ForecastingProblem
from models.zoo import catalogue
from rafaga.bundle import ForecastSpec


@dataclass(frozen=True)
class Forecasts:
    """`quantiles` float32 [N, max_horizon, Q] of the shipped network at the `origins` of the last fifth."""

    spec: ForecastSpec
    origins: Origins
    quantiles: Series


def forecasters() -> list[str]:
    return [n for n, e in catalogue().items() if isinstance(e.input, ForecastSpec) and isinstance(e.weights, Shipped)]


def forecasts(name: str, root: Path | None, steps: Steps = SILENT) -> Forecasts:
    """Raises DataUnavailable."""
    problem = recipes()[name].problem(root, steps)
    assert isinstance(problem, ForecastingProblem)
    load_weights(catalogue()[name], problem.module)
    problem.module.eval()
    origins = held_out(problem.series, problem.spec)
    return Forecasts(problem.spec, origins, quantiles_of(problem.forecast, origins))


def tabulate(
    module: str,
    about: str,
    columns: Sequence[str],
    rows: Callable[[str, Path | None, Steps], Iterable[Sequence[str]]],
    arguments: list[str] | None,
) -> int:
    """The command `python -m module [NAME...]`: a table with the `rows` of each forecaster. Its exit code."""
    parser = argparse.ArgumentParser(f"python -m {module}", description=about)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: every forecaster")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with a copy of the series; default: download")
    options = parser.parse_args(arguments)
    known = forecasters()
    if unknown := set(options.names) - set(known):
        parser.error(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    console = Console()
    table = Table("name", *columns)
    for name in options.names or known:
        try:
            with shown(console, name) as steps:
                found = list(rows(name, options.data, steps))
        except DataUnavailable as error:
            console.print(str(error), style="red", markup=False)
            return 1
        for row in found:
            table.add_row(name, *row)
    console.print(table)
    return 0
