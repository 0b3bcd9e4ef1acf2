"""`python -m models.training.significance [NAME...]`: compares forecasters with baselines, with standard errors.

Shipped forecasters and baselines forecast the same origins of the last fifth, and their errors are compared origin by
origin (Diebold & Mariano 1995). Horizons of neighbouring origins overlap, so the standard error of the mean difference
is that of Newey & West (1987), with lags of twice the overlap. It covers the choice of origins only, not another seed
or another decade.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.progress import SILENT, Steps
from models.training.data import Series
from models.training.forecast_eval import Origins, drift, holt_winters, overlap, seasonal_naive
from models.training.shipped import forecasts, tabulate
from rafaga.bundle import ForecastSpec

Errors = npt.NDArray[np.float64]  # [N]: mean absolute error of each origin's horizon, in the unit of MASE


@dataclass(frozen=True)
class Comparison:
    """MASE of a network and of a baseline, and the standard error of the difference between them."""

    baseline: str
    network_mase: float
    baseline_mase: float
    standard_error: float

    @property
    def difference(self) -> float:
        """Negative if the network is better."""
        return self.network_mase - self.baseline_mase


def compare(name: str, root: Path | None, steps: Steps = SILENT) -> Iterator[Comparison]:
    """The shipped forecaster `name` against every baseline for its series. Raises DataUnavailable."""
    found = forecasts(name, root, steps)
    origins, spec = found.origins, found.spec
    network = errors(origins, found.quantiles[:, :, spec.quantile_levels.index(0.5)])
    for baseline, forecast in _baselines(origins, spec, steps):
        yield compared(baseline, network, errors(origins, forecast), overlap(origins))


def errors(origins: Origins, forecast: Series) -> Errors:
    return np.asarray(np.abs(origins.future - forecast).mean(1) / origins.scale, dtype=np.float64)


def compared(baseline: str, network: Errors, other: Errors, overlap: int) -> Comparison:
    from statsmodels.regression.linear_model import OLS

    difference = network - other
    fit = OLS(difference, np.ones(len(difference))).fit(cov_type="HAC", cov_kwds={"maxlags": 2 * overlap})
    return Comparison(baseline, float(network.mean()), float(other.mean()), float(fit.bse[0]))


def _baselines(origins: Origins, spec: ForecastSpec, steps: Steps) -> Iterator[tuple[str, Series]]:
    if spec.season > 1:
        yield "seasonal naive", seasonal_naive(origins, spec)
    else:
        yield "naive", seasonal_naive(origins, spec)
        yield "random walk with drift", drift(origins)
    yield "Holt-Winters", holt_winters(origins, spec, steps)


def rows(name: str, root: Path | None, steps: Steps) -> Iterator[tuple[str, ...]]:
    for c in compare(name, root, steps):
        difference = f"{c.difference:+.3f} ± {c.standard_error:.3f}"
        yield c.baseline, f"{c.baseline_mase:.3f}", f"{c.network_mase:.3f}", difference


def main(arguments: list[str] | None = None) -> int:
    columns = ("baseline", "its MASE", "the network's", "difference ± standard error")
    return tabulate("models.training.significance", __doc__.splitlines()[0], columns, rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
