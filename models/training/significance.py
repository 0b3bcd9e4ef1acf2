"""`python -m models.training.significance [NAME...]`: is a forecaster better than the baselines, or was it lucky?

Shipped forecasters and baselines forecast the same origins of the last fifth, and their errors are compared origin by
origin (Diebold & Mariano 1995). Horizons of neighbouring origins overlap, so the standard error of the mean difference
is that of Newey & West (1987), over twice as many lags as overlap. It knows the chance of these origins alone: not that
of another seed, nor of another decade.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from models.entry import SeriesInput, Shipped
from models.loading import load_weights
from models.progress import SILENT, Steps, shown
from models.training.data import DataUnavailable, Series
from models.training.forecast_eval import Origins, drift, held_out, holt_winters, seasonal_naive
from models.training.recipes import recipes
from models.training.series import Forecasting
from models.zoo import catalogue

Errors = npt.NDArray[np.float64]  # [N], of each origin: mean absolute error of its horizon, in the unit of MASE


@dataclass(frozen=True)
class Comparison:
    """MASE of a network and of a baseline, and the standard error of the difference between them."""

    baseline: str
    network_mase: float
    baseline_mase: float
    standard_error: float

    @property
    def difference(self) -> float:
        """Below zero where the network is better."""
        return self.network_mase - self.baseline_mase


def compare(name: str, root: Path | None, steps: Steps = SILENT) -> Iterator[Comparison]:
    """The shipped forecaster `name` against every baseline that its series has. Raises DataUnavailable."""
    entry = catalogue()[name]
    problem = recipes()[name].problem(root, steps)
    assert isinstance(problem, Forecasting)
    load_weights(entry, problem.module)
    problem.module.eval()
    origins = held_out(problem.series, problem.spec)
    median = problem.forecast(origins.history, origins.length)[:, :, problem.spec.quantile_levels.index(0.5)]
    network = errors(origins, median)
    for baseline, forecast in _baselines(origins, problem.spec, steps):
        yield compared(baseline, network, errors(origins, forecast), overlap(origins))


def errors(origins: Origins, forecast: Series) -> Errors:
    return np.asarray(np.abs(origins.future - forecast).mean(1) / origins.scale, dtype=np.float64)


def overlap(origins: Origins) -> int:
    """How many origins further on a horizon reaches."""
    return math.ceil(int(origins.future.shape[1]) / origins.stride)


def compared(baseline: str, network: Errors, other: Errors, overlap: int) -> Comparison:
    from statsmodels.regression.linear_model import OLS

    difference = network - other
    fit = OLS(difference, np.ones(len(difference))).fit(cov_type="HAC", cov_kwds={"maxlags": 2 * overlap})
    return Comparison(baseline, float(network.mean()), float(other.mean()), float(fit.bse[0]))


def _baselines(origins: Origins, spec: SeriesInput, steps: Steps) -> Iterator[tuple[str, Series]]:
    if spec.season > 1:
        yield "seasonal naive", seasonal_naive(origins, spec)
    else:
        yield "naive", seasonal_naive(origins, spec)
        yield "random walk with drift", drift(origins)
    yield "Holt-Winters", holt_winters(origins, spec, steps)


def main(arguments: list[str] | None = None) -> int:
    shipped = [n for n, e in catalogue().items() if isinstance(e.input, SeriesInput) and isinstance(e.weights, Shipped)]
    parser = argparse.ArgumentParser("python -m models.training.significance", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: every forecaster")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with a copy of the series; else downloaded")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(shipped):
        parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(shipped)}")
    console = Console()
    table = Table("name", "baseline", "its MASE", "the network's", "difference ± standard error")
    for name in options.names or shipped:
        try:
            with shown(console, name) as steps:
                found = list(compare(name, options.data, steps))
        except DataUnavailable as error:
            console.print(str(error), style="red", markup=False)
            return 1
        for c in found:
            difference = f"{c.difference:+.3f} ± {c.standard_error:.3f}"
            table.add_row(name, c.baseline, f"{c.baseline_mase:.3f}", f"{c.network_mase:.3f}", difference)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
