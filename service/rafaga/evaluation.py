"""Figures of forecasts, and the baselines to compare them with. Training, export and `rafaga backtest` share them.

Shapes: N origins, each with a horizon of H steps and quantiles of Q levels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Errors = npt.NDArray[np.float64]  # [N]: a figure of each origin

TEST_FRACTION = 0.2
_DRAWS = 2000  # of the bootstrap


def training_size(series: Floats) -> int:
    """The number of observations for training; the last fifth of a series is for tests."""
    return len(series) - int(len(series) * TEST_FRACTION)


def intervals(levels: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Pairs of levels symmetric around the median, widest first."""
    return ((i, len(levels) - 1 - i) for i in range(len(levels) // 2))


def naive_error(series: Floats, season: int) -> float:
    """Mean absolute error of the seasonal-naive forecast in `series` [T], the unit of MASE; 0 where it repeats itself.
    Missing values (NaN) are left out."""
    return float(np.nanmean(np.abs(series[season:] - series[:-season])))


def scaled_errors(truth: Floats, forecast: Floats, scale: Floats) -> Errors:
    """Mean absolute error of each horizon over `scale` [N]; their mean is MASE. `truth` and `forecast` [N, H]."""
    return np.asarray(np.abs(truth - forecast).mean(1) / scale, dtype=np.float64)


def pinball(truth: Floats, quantiles: Floats, levels: Sequence[float]) -> Errors:
    """Mean over steps and levels, in the unit of the series; half the absolute error at level 0.5. `truth` [N, H],
    `quantiles` [N, H, Q]."""
    error = truth[:, :, None] - quantiles
    level = np.asarray(levels, dtype=np.float32)
    return np.asarray(np.maximum(level * error, (level - 1) * error).mean((1, 2)), dtype=np.float64)


def coverage_name(levels: Sequence[float], low: int, high: int) -> str:
    """Of the figure of the interval between two levels, given by their positions."""
    return f"coverage_{round(100 * (levels[high] - levels[low]))}"


@dataclass(frozen=True)
class Share:
    """`held` bool [N, H] is True in a share `nominal` of the cases if the forecast is calibrated."""

    name: str
    nominal: float
    held: npt.NDArray[np.bool_]


def shares(truth: Floats, quantiles: Floats, levels: Sequence[float]) -> Iterator[Share]:
    """`coverage_P`: observations inside the central interval of P percent, its edges included.

    `coverage_qP`: observations at or below the quantile of P percent. It shows when both quantiles of an interval are
    too high, although the interval holds its share.
    """
    below = truth[:, :, None] <= quantiles
    for low, high in intervals(levels):
        inside = (quantiles[:, :, low] <= truth) & below[:, :, high]
        yield Share(coverage_name(levels, low, high), levels[high] - levels[low], inside)
    for number, level in enumerate(levels):
        yield Share(f"coverage_q{f'{100 * level:g}'.zfill(2)}", level, below[:, :, number])


def standard_error(each: Errors, overlap: int, series: npt.NDArray[np.int64] | None = None, seed: int = 0) -> float:
    """Of the mean of `each`; 0: unknown, as where a series has no more origins than one block.

    Moving-block bootstrap (Künsch 1989) with blocks of `overlap` origins, as many as a horizon spans: neighbours share
    most of their horizon. `series` [N]: the number of each origin's series, which are taken as independent; None: one.
    """
    parts = [each] if series is None else [each[series == number] for number in np.unique(series)]
    return math.hypot(*(len(part) / len(each) * _bootstrapped(part, overlap, seed) for part in parts))


def _bootstrapped(each: Errors, block: int, seed: int) -> float:
    block = min(block, len(each))
    starts = np.random.default_rng(seed).integers(0, len(each) - block + 1, (_DRAWS, -(-len(each) // block)))
    drawn = (starts[:, :, None] + np.arange(block)).reshape(_DRAWS, -1)[:, : len(each)]
    return float(each[drawn].mean(axis=1).std())


class NormalForecast(NamedTuple):
    """Mean and standard deviation of every step [H]."""

    mean: Floats
    deviation: Floats

    def quantiles(self, levels: Sequence[float]) -> Floats:
        """[H, Q]"""
        scores: Floats = np.array([NormalDist().inv_cdf(level) for level in levels])
        return self.mean[:, None] + self.deviation[:, None] * scores


def seasonal_naive(history: Floats, season: int, horizon: int) -> NormalForecast:
    """The last season of `history` [T], repeated. Deviations: Hyndman & Athanasopoulos, fpp3, section 5.5."""
    step = np.arange(horizon)
    changes = history[season:] - history[:-season]
    deviation = np.sqrt(np.mean(changes**2) * (step // season + 1)) if len(changes) else np.full(horizon, np.nan)
    return NormalForecast(history[len(history) - season + step % season], deviation)


def drift(history: Floats, season: int, horizon: int) -> NormalForecast:
    """The last value of `history` [T] plus the mean step of all of it; for series without a season."""
    step, count = np.arange(1, horizon + 1), len(history) - 1
    slope = (history[-1] - history[0]) / count
    deviation = np.std(np.diff(history)) * np.sqrt(step * (1 + step / count))
    return NormalForecast(history[-1] + slope * step, deviation)


def holt_winters(history: Floats, season: int, horizon: int) -> NormalForecast:
    """Additive exponential smoothing with a damped trend, ETS(A,Ad,A), fitted to `history` [T] by statsmodels.

    Deviations: Hyndman et al. 2008, Forecasting with Exponential Smoothing, section 6.1.
    """
    from statsmodels.tsa.holtwinters import ExponentialSmoothing
    from threadpoolctl import threadpool_limits

    # One thread: such small matrices cost several threads five times the processor time.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimiser's result is good enough even if it stops early
        fit = ExponentialSmoothing(
            history.astype(np.float64),
            trend="add",
            damped_trend=True,
            seasonal="add" if season > 1 else None,
            seasonal_periods=season if season > 1 else None,
        ).fit()
    step = np.arange(1, horizon)
    level, damping = fit.params["smoothing_level"], fit.params["damping_trend"]
    weight = level * (1 + fit.params["smoothing_trend"] * np.cumsum(damping**step))
    if season > 1:
        weight = weight + fit.params["smoothing_seasonal"] * (step % season == 0)
    growth = 1 + np.concatenate([[0], np.cumsum(weight**2)])
    fitted = 5 + (season if season > 1 else 0)  # parameters
    variance = np.sum(fit.resid**2) / max(1, len(history) - fitted)
    return NormalForecast(fit.forecast(horizon), np.sqrt(variance * growth))


@dataclass(frozen=True)
class Baseline:
    """`metric`: the name of its MASE among the figures of a bundle. `forecast`: of a history, a season, a horizon."""

    metric: str
    name: str
    forecast: Callable[[Floats, int, int], NormalForecast]


SEASONAL_NAIVE = Baseline("mase_seasonal_naive", "seasonal naive", seasonal_naive)
DRIFT = Baseline("mase_drift", "random walk with drift", drift)
HOLT_WINTERS = Baseline("mase_holt_winters", "Holt-Winters", holt_winters)


def baselines_for(season: int) -> tuple[Baseline, ...]:
    """Those for a series with this season."""
    return (SEASONAL_NAIVE, HOLT_WINTERS) if season > 1 else (SEASONAL_NAIVE, DRIFT, HOLT_WINTERS)


@dataclass(frozen=True)
class Comparison:
    """Mean errors of a model and of a baseline, and the standard error of the difference between them.

    Errors are compared origin by origin (Diebold & Mariano 1995). Horizons of neighbouring origins overlap, so the
    standard error is that of Newey & West (1987), with lags of twice the overlap. It covers the choice of origins only,
    not another seed or another decade.
    """

    baseline: Baseline
    model_error: float
    baseline_error: float
    standard_error: float

    @property
    def difference(self) -> float:
        """Negative if the model is better."""
        return self.model_error - self.baseline_error

    @property
    def baseline_is_better(self) -> bool:
        """By more than two standard errors."""
        return self.difference > 2 * self.standard_error

    def verdict(self, model: str = "this network", figure: str = "MASE") -> str:
        """One sentence: which of the two is better by the errors' mean, called `figure`."""
        name = self.baseline.name
        figures = (
            f"{figure} {self.model_error:.3f}, {name} {self.baseline_error:.3f}, "
            f"difference {self.difference:+.3f} ± {self.standard_error:.3f}"
        )
        if self.baseline_is_better:
            return f"{name} is better than {model}: {figures}"
        if self.difference < -2 * self.standard_error:
            return f"better than {name}: {figures}"
        return f"no clear difference from {name}: {figures}"


def compared(baseline: Baseline, model: Errors, other: Errors, overlap: int) -> Comparison:
    """`model` and `other`: errors of the same origins. `overlap`: how many origins a horizon spans."""
    difference = model - other
    lags = min(2 * overlap, len(difference) - 1)
    return Comparison(baseline, float(model.mean()), float(other.mean()), _newey_west(difference, lags))


def _newey_west(values: Errors, lags: int) -> float:
    """Standard error of the mean of values that correlate up to `lags` neighbours away."""
    centred = values - values.mean()
    total = float(centred @ centred)
    for lag in range(1, lags + 1):
        total += 2 * (1 - lag / (lags + 1)) * float(centred[lag:] @ centred[:-lag])
    return float(np.sqrt(max(total, 0.0)) / len(values))
