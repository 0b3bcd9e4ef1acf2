"""`python -m models.training.coverage [NAME...]`: measures the coverage of quantiles and intervals.

For every shipped forecaster, on the last fifth of its series. Horizons of neighbouring origins overlap, so the standard
error of a share comes from a moving-block bootstrap with blocks as long as a horizon (Künsch 1989).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from models.progress import Steps
from models.training.forecast_eval import overlap
from models.training.shipped import forecasts, tabulate
from rafaga.evaluation import shares, standard_error


def rows(name: str, root: Path | None, steps: Steps) -> Iterator[tuple[str, ...]]:
    found = forecasts(name, root, steps)
    for share in shares(found.origins.future, found.quantiles, found.spec.quantile_levels):
        error = standard_error(share.held.mean(1), overlap(found.origins))
        held = float(share.held.mean())
        points = f"{100 * (held - share.nominal):+.1f} ± {100 * error:.1f}"
        yield share.name, f"{100 * share.nominal:g} %", f"{100 * held:.1f} %", points


def main(arguments: list[str] | None = None) -> int:
    columns = ("figure", "nominal", "found", "difference ± standard error, points")
    return tabulate("models.training.coverage", __doc__.splitlines()[0], columns, rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
