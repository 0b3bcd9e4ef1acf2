"""Quantiles between and beyond those that the model gives: other levels, and forecasts of several blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rafaga.bundle import ForecastSpec
from rafaga.errors import InvalidRequest

Floats = NDArray[np.float32]


def stored(spec: ForecastSpec) -> Floats:
    """The model's levels, float32 [L], as requests can have them."""
    return np.array(spec.quantile_levels, np.float32)


def wanted(levels: Sequence[float], spec: ForecastSpec) -> Floats:
    """float32 [K]. Raises InvalidRequest if they do not rise or leave the range of the model's."""
    found, own = np.array(levels, np.float32), stored(spec)
    if not (np.diff(found) > 0).all():
        raise InvalidRequest("expected rising levels in `quantiles`")
    if not own[0] <= found[0] <= found[-1] <= own[-1]:
        outside = found[0] if not own[0] <= found[0] <= own[-1] else found[-1]
        raise InvalidRequest(
            f"expected quantiles from {own[0]!s} to {own[-1]!s}, which the model gives; got {outside!s}"
        )
    return found


def at(levels: Floats, forecast: Floats, own: Floats) -> Floats:
    """[..., K] for `levels` [K], linear between the neighbours of `own` [L]: `forecast` is [..., L]."""
    if len(own) == 1:
        return forecast
    above = np.clip(np.searchsorted(own, levels), 1, len(own) - 1)
    below = above - 1
    share = (levels - own[below]) / (own[above] - own[below])
    return np.asarray(forecast[..., below] * (1 - share) + forecast[..., above] * share)


def median(forecast: Floats, own: Floats) -> Floats:
    """[..., 1] of [..., L]."""
    return at(np.array([0.5], np.float32), forecast, own)


def widened(block: Floats, before: Floats, own: Floats) -> tuple[Floats, Floats]:
    """A block of a forecast that continues another, [N, T, L], and its distances from the median at its last step,
    [N, L]. `before`: those of the block before, zeros for the first.

    The block's own quantiles take the continued history for certain. So each quantile's distance d from the median
    becomes sqrt(d² + e²), e being the distance at the last step of the block before: errors of independent blocks add.
    """
    middle = median(block, own)
    distance = np.hypot(block - middle, before[:, np.newaxis])
    return np.asarray(middle + np.sign(own - np.float32(0.5)) * distance), distance[:, -1]


def widest_interval(spec: ForecastSpec) -> tuple[int, int] | None:
    """The positions of two levels that leave out equal shares below and above."""
    levels = spec.quantile_levels
    for lower, level in enumerate(levels):
        for upper in range(len(levels) - 1, lower, -1):
            if abs(level + levels[upper] - 1) < 1e-6:
                return lower, upper
    return None
