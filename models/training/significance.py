"""`python -m models.training.significance [NAME...]`: compares forecasters with baselines, with standard errors.

Shipped forecasters and baselines forecast the same origins of the last fifth of their series.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from models.progress import SILENT, Steps
from models.training.forecast_eval import baselines, comparisons
from models.training.shipped import forecasts, tabulate
from rafaga.evaluation import Comparison


def compare(name: str, root: Path | None, steps: Steps = SILENT) -> Iterator[Comparison]:
    """The shipped forecaster `name` against every baseline for its series. Raises DataUnavailable."""
    found = forecasts(name, root, steps)
    others = baselines(found.origins, found.spec, steps)
    return comparisons(found.origins, found.spec, found.quantiles, others)


def rows(name: str, root: Path | None, steps: Steps) -> Iterator[tuple[str, ...]]:
    for c in compare(name, root, steps):
        difference = f"{c.difference:+.3f} ± {c.standard_error:.3f}"
        yield c.baseline.name, f"{c.baseline_error:.3f}", f"{c.model_error:.3f}", difference


def main(arguments: list[str] | None = None) -> int:
    columns = ("baseline", "its MASE", "the network's", "difference ± standard error")
    return tabulate("models.training.significance", __doc__.splitlines()[0], columns, rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
