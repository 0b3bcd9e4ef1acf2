"""Finds the period of a series."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from models.training.data import Series

_SHORTEST, _LONGEST = 4, 400  # steps
_LEAST = 0.2  # correlation; a random walk's changes have none


def find_season(series: Sequence[Series]) -> int:
    """The steps in one period, or 1 if the series have none. A quarter of the shortest series bounds it.

    It is the lag at which changes from step to step correlate best, and much better than around half of it. Changes,
    because a trend or a wandering level correlates at every lag. Of lags that are almost as good, as multiples of the
    period are, the shortest is taken.
    """
    shortest = min(len(one) for one in series)
    longest = min(_LONGEST, shortest // 4)
    if longest < _SHORTEST:
        return 1
    found = np.mean([_correlations(np.diff(one.astype(np.float64)), longest + 1) for one in series], axis=0)
    peaks = {
        lag: found[lag]
        for lag in range(_SHORTEST, longest + 1)
        if found[lag - 1] < found[lag] >= found[lag + 1]
        and np.median(found[lag // 3 : 2 * lag // 3 + 1]) < 0.5 * found[lag]
    }
    best = max(peaks.values(), default=0.0)
    if best < max(_LEAST, 3 / shortest**0.5):
        return 1
    return min(lag for lag, value in peaks.items() if value >= 0.85 * best)


def _correlations(x: npt.NDArray[np.float64], lags: int) -> npt.NDArray[np.float64]:
    """At the lags 0 .. `lags`."""
    centred = x - x.mean()
    power = float(centred @ centred) or 1.0
    return np.array([centred[lag:] @ centred[: len(x) - lag] / power for lag in range(lags + 1)])
