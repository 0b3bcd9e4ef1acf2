"""Rolling-origin evaluation of forecasters on the last fifth of a series, which training never sees.

The whole horizon is forecast from the history before it, every `stride` steps. The seasonal-naive forecast and
Holt-Winters' exponential smoothing, the statistical baseline, forecast the same origins, to show what a network adds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.progress import SILENT, Steps
from models.training.data import Series
from rafaga.bundle import ForecastSpec, Metric

TEST_FRACTION = 0.2
_ROWS = 64  # origins per run

# history float32 [N, T] right-padded with zeros, length int64 [N] -> quantiles float32 [N, max_horizon, Q]
Forecast = Callable[[Series, npt.NDArray[np.int64]], Series]


@dataclass(frozen=True)
class Origins:
    """Rows of `history` end where the rows of `future` float32 [N, max_horizon] begin."""

    history: Series
    length: npt.NDArray[np.int64]
    future: Series
    scale: float  # mean absolute error of the seasonal-naive forecast inside the training part: the unit of MASE
    stride: int  # steps from one origin to the next


def training_size(series: Series) -> int:
    """The number of observations for training."""
    return len(series) - int(len(series) * TEST_FRACTION)


def rolling_origins(series: Series, spec: ForecastSpec, start: int, stop: int, stride: int = 1) -> Origins:
    """Origins `start`, `start + stride`, ... whose whole horizon ends before `stop`."""
    origins = range(max(start, spec.min_history), stop - spec.max_horizon + 1, stride)
    history = np.zeros((len(origins), min(origins[-1], spec.max_history)), dtype=np.float32)
    length = np.array([min(origin, spec.max_history) for origin in origins], dtype=np.int64)
    for row, origin in enumerate(origins):
        history[row, : length[row]] = series[origin - length[row] : origin]
    future = np.stack([series[origin : origin + spec.max_horizon] for origin in origins])
    seen = series[: training_size(series)]
    scale = float(np.abs(seen[spec.season :] - seen[: -spec.season]).mean())
    return Origins(history, length, future, scale, stride)


def held_out(series: Series, spec: ForecastSpec) -> Origins:
    """The origins of the last fifth; at most a few hundred of them, spread evenly."""
    start = training_size(series)
    stride = max(1, (len(series) - start) // 300)
    return rolling_origins(series, spec, start, len(series), stride)


def overlap(origins: Origins) -> int:
    """The number of origins that a horizon spans."""
    return math.ceil(int(origins.future.shape[1]) / origins.stride)


def evaluate(origins: Origins, spec: ForecastSpec, forecast: Forecast, dataset: str) -> tuple[Metric, ...]:
    """`mase` of the median, `pinball` (mean over levels, in the unit of the series), and the figures of `shares`.

    At level 0.5 the pinball loss is half the absolute error.
    """
    quantiles = quantiles_of(forecast, origins)
    levels = np.array(spec.quantile_levels, dtype=np.float32)
    error = origins.future[:, :, None] - quantiles  # [N, H, Q]
    figures = {
        "mase": float(np.abs(error[:, :, spec.quantile_levels.index(0.5)]).mean()) / origins.scale,
        "pinball": float(np.maximum(levels * error, (levels - 1) * error).mean()),
    }
    figures |= {share.name: float(share.held.mean()) for share in shares(origins, spec, quantiles)}
    return _metrics(figures, dataset, len(origins.length))


def quantiles_of(forecast: Forecast, origins: Origins) -> Series:
    """The forecasts at all origins. [N, max_horizon, Q]"""
    rows = (slice(start, start + _ROWS) for start in range(0, len(origins.length), _ROWS))
    return np.concatenate([forecast(origins.history[some], origins.length[some]) for some in rows])


@dataclass(frozen=True)
class Share:
    """`held` bool [N, max_horizon] is True in a share `nominal` of the cases if the forecast is calibrated."""

    name: str
    nominal: float
    held: npt.NDArray[np.bool_]


def shares(origins: Origins, spec: ForecastSpec, quantiles: Series) -> Iterator[Share]:
    """`coverage_P`: observations inside the central interval of P percent, its edges included.

    `coverage_qP`: observations at or below the quantile of P percent. It shows when both quantiles of an interval are
    too high, although the interval holds its share.
    """
    levels = spec.quantile_levels
    below = origins.future[:, :, None] <= quantiles  # [N, H, Q]
    for low, high in intervals(levels):
        inside = (quantiles[:, :, low] <= origins.future) & below[:, :, high]
        yield Share(f"coverage_{round(100 * (levels[high] - levels[low]))}", levels[high] - levels[low], inside)
    for number, level in enumerate(levels):
        yield Share(f"coverage_q{f'{100 * level:g}'.zfill(2)}", level, below[:, :, number])


def intervals(levels: tuple[float, ...]) -> Iterator[tuple[int, int]]:
    """Pairs of levels symmetric around the median, widest first."""
    return ((i, len(levels) - 1 - i) for i in range(len(levels) // 2))


def baselines(origins: Origins, spec: ForecastSpec, dataset: str, steps: Steps = SILENT) -> tuple[Metric, ...]:
    """`mase_seasonal_naive` and `mase_holt_winters` on the same origins."""
    figures = {
        "mase_seasonal_naive": _mean_error(origins, seasonal_naive(origins, spec)) / origins.scale,
        "mase_holt_winters": _mean_error(origins, holt_winters(origins, spec, steps)) / origins.scale,
    }
    return _metrics(figures, dataset, len(origins.length))


def seasonal_naive(origins: Origins, spec: ForecastSpec) -> Series:
    """The last season, repeated. [N, max_horizon]"""
    ahead = np.arange(spec.max_horizon) % spec.season
    return np.take_along_axis(origins.history, origins.length[:, None] - spec.season + ahead, axis=1)


def drift(origins: Origins) -> Series:
    """The last value plus the mean step of the whole history. [N, max_horizon]"""
    last = np.take_along_axis(origins.history, origins.length[:, None] - 1, axis=1)
    step = (last - origins.history[:, :1]) / (origins.length[:, None] - 1)
    return (last + step * np.arange(1, origins.future.shape[1] + 1)).astype(np.float32)


def holt_winters(origins: Origins, spec: ForecastSpec, steps: Steps = SILENT) -> Series:
    """Additive exponential smoothing (statsmodels), damped trend, fitted at every origin. [N, max_horizon]"""
    from statsmodels.tsa.holtwinters import ExponentialSmoothing

    seasonal = "add" if spec.season > 1 else None
    steps.step("fitting Holt-Winters at every origin, the baseline")
    rows: list[npt.NDArray[np.float64]] = []
    for history, length in zip(origins.history, origins.length, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimiser's result is good enough even if it stops early
            model = ExponentialSmoothing(
                history[:length].astype(np.float64),
                trend="add",
                damped_trend=True,
                seasonal=seasonal,
                seasonal_periods=spec.season if seasonal else None,
            ).fit()
        rows.append(model.forecast(spec.max_horizon))
        steps.advance(len(rows), len(origins.length))
    return np.array(rows, dtype=np.float32)


def _mean_error(origins: Origins, forecast: Series) -> float:
    return float(np.abs(origins.future - forecast).mean())


def _metrics(figures: Mapping[str, float], dataset: str, samples: int) -> tuple[Metric, ...]:
    return tuple(Metric(name=n, value=float(v), dataset=dataset, samples=samples) for n, v in figures.items())
