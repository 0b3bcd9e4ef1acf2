"""Observations beside the intervals that were forecast for them one step before."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rafaga.errors import InvalidTensor
from rafaga.server.services.forecasting.quantiles import widest_interval
from rafaga.server.services.forecasting.series import Observations
from rafaga.v1 import forecasting_pb2 as pb

_LARGEST = float(np.finfo(np.float32).max)


def positions(series: Observations, last: int) -> list[int]:
    """Those of the `last` values that were observed. Raises InvalidTensor if too few come before them."""
    count, shortest = len(series.values), series.spec.min_history
    if last and count - last < shortest:
        raise InvalidTensor(
            f"{series.where}check_last: expected at least {shortest + last} observations, {shortest} before the first "
            f"that is checked; got {count}"
        )
    return [at for at in range(count - last, count) if series.present is None or series.present[at]]


def check(series: Observations, position: int, forecast: NDArray[np.generic]) -> pb.ObservationCheck:
    """`forecast`: [L], of the step at `position`."""
    interval = widest_interval(series.spec)
    assert interval is not None  # Options checks it
    lower, upper = forecast[list(interval)].tolist()
    observed = float(series.values[position])
    distance, half = abs(observed - (lower + upper) / 2), abs(upper - lower) / 2
    score = min(distance / half, _LARGEST) if half else (_LARGEST if distance else 0.0)
    return pb.ObservationCheck(
        position=position, observed=observed, lower=lower, upper=upper, score=score, anomaly=score > 1
    )
