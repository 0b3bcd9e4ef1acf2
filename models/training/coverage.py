"""`python -m models.training.coverage [NAME...]`: measures the coverage of quantiles and intervals.

For every shipped forecaster, on the last fifth of its series. Horizons of neighbouring origins overlap, so the standard
error of a share comes from a moving-block bootstrap with blocks as long as a horizon (Künsch 1989).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.progress import Steps
from models.training.forecast_eval import Share, overlap, shares
from models.training.shipped import forecasts, tabulate

DRAWS = 2000


def standard_error(share: Share, block: int, seed: int = 0) -> float:
    """Of the mean of `share.held`, with blocks of `block` origins."""
    each: npt.NDArray[np.float64] = share.held.mean(axis=1)
    block = min(block, len(each))
    starts = np.random.default_rng(seed).integers(0, len(each) - block + 1, (DRAWS, -(-len(each) // block)))
    drawn = (starts[:, :, None] + np.arange(block)).reshape(DRAWS, -1)[:, : len(each)]
    return float(each[drawn].mean(axis=1).std())


def rows(name: str, root: Path | None, steps: Steps) -> Iterator[tuple[str, ...]]:
    found = forecasts(name, root, steps)
    for share in shares(found.origins, found.spec, found.quantiles):
        held, error = float(share.held.mean()), standard_error(share, overlap(found.origins))
        points = f"{100 * (held - share.nominal):+.1f} ± {100 * error:.1f}"
        yield share.name, f"{100 * share.nominal:g} %", f"{100 * held:.1f} %", points


def main(arguments: list[str] | None = None) -> int:
    columns = ("figure", "nominal", "found", "difference ± standard error, points")
    return tabulate("models.training.coverage", __doc__.splitlines()[0], columns, rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
