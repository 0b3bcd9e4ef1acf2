"""Finds the period of a series."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from models.training.data import Series

_LONGEST = 400  # steps
_LEAST = 0.2  # correlation; a random walk's changes have none


def find_season(series: Sequence[Series]) -> int:
    """The steps in one period, or 1 if the series have none. A quarter of the shortest series bounds it.

    It is the lag at which changes from step to step correlate best. Changes, because a trend or a wandering level
    correlates at every lag. Of lags that are almost as good, as multiples of the period are, the shortest is taken.
    """
    longest = min(_LONGEST, min(len(one) for one in series) // 4)
    if longest < 3:
        return 1
    found = np.mean([_correlations(np.diff(one.astype(np.float64)), longest + 1) for one in series], axis=0)  # [lags]
    inner = found[1:-1]  # lags 2 .. longest
    peaks = np.flatnonzero((inner > found[:-2]) & (inner >= found[2:]))
    least = max(_LEAST, 3 / min(len(one) for one in series) ** 0.5)
    if not len(peaks) or inner[peaks].max() < least:
        return 1
    return int(peaks[inner[peaks] >= 0.85 * inner[peaks].max()][0]) + 2


def _correlations(x: npt.NDArray[np.float64], lags: int) -> npt.NDArray[np.float64]:
    """At the lags 1 .. `lags`."""
    centred = x - x.mean()
    power = float(centred @ centred) or 1.0
    return np.array([centred[lag:] @ centred[:-lag] / power for lag in range(1, lags + 1)])
