"""Rolling-origin evaluation of forecasters on the last fifth of each series, which training never sees.

The whole horizon is forecast from the history before it, every `stride` steps. The seasonal-naive forecast and
Holt-Winters' exponential smoothing, the statistical baseline, forecast the same origins, to show what a network adds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.progress import SILENT, Steps
from models.training.data import Series
from rafaga.bundle import ForecastSpec, Metric

TEST_FRACTION = 0.2
_ROWS = 64  # origins per run
_DRAWS = 2000  # of the bootstrap

# history float32 [N, T] right-padded with zeros, length int64 [N] -> quantiles float32 [N, max_horizon, Q]
Forecast = Callable[[Series, npt.NDArray[np.int64]], Series]


@dataclass(frozen=True)
class Origins:
    """Rows of `history` end where the rows of `future` float32 [N, max_horizon] begin."""

    history: Series
    length: npt.NDArray[np.int64]
    future: Series
    # [N]: mean absolute error of the seasonal-naive forecast inside the training part, the unit of MASE
    scale: npt.NDArray[np.float64]
    stride: int  # steps from one origin to the next


def training_size(series: Series) -> int:
    """The number of observations for training."""
    return len(series) - int(len(series) * TEST_FRACTION)


def naive_error(series: Series, season: int) -> float:
    """Mean absolute error of the seasonal-naive forecast inside the training part; 0 where it repeats itself."""
    seen = series[: training_size(series)]
    return float(np.abs(seen[season:] - seen[:-season]).mean())


def rolling_origins(series: Series, spec: ForecastSpec, start: int, stop: int, stride: int = 1) -> Origins:
    """Origins `start`, `start + stride`, ... whose whole horizon ends before `stop`."""
    origins = range(max(start, spec.min_history), stop - spec.max_horizon + 1, stride)
    history = np.zeros((len(origins), min(max(origins), spec.max_history)), dtype=np.float32)
    length = np.array([min(origin, spec.max_history) for origin in origins], dtype=np.int64)
    for row, origin in enumerate(origins):
        history[row, : length[row]] = series[origin - length[row] : origin]
    future = np.stack([series[origin : origin + spec.max_horizon] for origin in origins])
    return Origins(history, length, future, np.full(len(origins), naive_error(series, spec.season)), stride)


def joined(parts: Sequence[Origins]) -> Origins:
    """The origins of several series, with one stride, one series after the other."""
    longest = max(part.history.shape[1] for part in parts)
    return Origins(
        history=np.concatenate([np.pad(p.history, ((0, 0), (0, longest - p.history.shape[1]))) for p in parts]),
        length=np.concatenate([part.length for part in parts]),
        future=np.concatenate([part.future for part in parts]),
        scale=np.concatenate([part.scale for part in parts]),
        stride=parts[0].stride,
    )


def held_out(series: Sequence[Series], spec: ForecastSpec) -> Origins:
    """The origins of the last fifth of each series, spread evenly: a few hundred in all.

    Fewer with a long season, where Holt-Winters takes seconds at each.
    """
    most = 300 if spec.season <= 24 else 60
    starts = [training_size(one) for one in series]
    stride = max(1, sum(len(one) - start for one, start in zip(series, starts, strict=True)) // most)
    return joined(
        [rolling_origins(one, spec, start, len(one), stride) for one, start in zip(series, starts, strict=True)]
    )


def overlap(origins: Origins) -> int:
    """The number of origins that a horizon spans."""
    return math.ceil(int(origins.future.shape[1]) / origins.stride)


def evaluate(origins: Origins, spec: ForecastSpec, quantiles: Series, dataset: str) -> tuple[Metric, ...]:
    """`mase` of the median, `pinball` (mean over levels, in the unit of the series), and the figures of `shares`.

    `quantiles`: the forecasts [N, max_horizon, Q]. At level 0.5 the pinball loss is half the absolute error.
    """
    levels = np.array(spec.quantile_levels, dtype=np.float32)
    error = origins.future[:, :, None] - quantiles  # [N, H, Q]
    figures = {
        "mase": float(errors(origins, quantiles[:, :, spec.quantile_levels.index(0.5)]).mean()),
        "pinball": float(np.maximum(levels * error, (levels - 1) * error).mean()),
    }
    figures |= {share.name: float(share.held.mean()) for share in shares(origins, spec, quantiles)}
    return metrics_of(figures, dataset, origins)


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


def standard_error(share: Share, block: int, seed: int = 0) -> float:
    """Of the mean of `share.held`, by a moving-block bootstrap with blocks of `block` origins (Künsch 1989)."""
    each: npt.NDArray[np.float64] = share.held.mean(axis=1)
    block = min(block, len(each))
    starts = np.random.default_rng(seed).integers(0, len(each) - block + 1, (_DRAWS, -(-len(each) // block)))
    drawn = (starts[:, :, None] + np.arange(block)).reshape(_DRAWS, -1)[:, : len(each)]
    return float(each[drawn].mean(axis=1).std())


def intervals(levels: tuple[float, ...]) -> Iterator[tuple[int, int]]:
    """Pairs of levels symmetric around the median, widest first."""
    return ((i, len(levels) - 1 - i) for i in range(len(levels) // 2))


Errors = npt.NDArray[np.float64]  # [N]: mean absolute error of each origin's horizon, in the unit of MASE

# Baselines by the name of their figure.
BASELINES = {
    "mase_seasonal_naive": "seasonal naive",
    "mase_drift": "random walk with drift",
    "mase_holt_winters": "Holt-Winters",
}


@dataclass(frozen=True)
class Comparison:
    """MASE of a network and of a baseline, and the standard error of the difference between them.

    Errors are compared origin by origin (Diebold & Mariano 1995). Horizons of neighbouring origins overlap, so the
    standard error is that of Newey & West (1987), with lags of twice the overlap. It covers the choice of origins only,
    not another seed or another decade.
    """

    metric: str  # a key of BASELINES
    network_mase: float
    baseline_mase: float
    standard_error: float

    @property
    def baseline(self) -> str:
        return BASELINES[self.metric]

    @property
    def difference(self) -> float:
        """Negative if the network is better."""
        return self.network_mase - self.baseline_mase


def comparisons(origins: Origins, spec: ForecastSpec, quantiles: Series, steps: Steps = SILENT) -> Iterator[Comparison]:
    """A network's `quantiles` against every baseline for its series, on the same origins."""
    network = errors(origins, quantiles[:, :, spec.quantile_levels.index(0.5)])
    yield compared("mase_seasonal_naive", network, errors(origins, seasonal_naive(origins, spec)), overlap(origins))
    if spec.season == 1:
        yield compared("mase_drift", network, errors(origins, drift(origins)), overlap(origins))
    yield compared("mase_holt_winters", network, errors(origins, holt_winters(origins, spec, steps)), overlap(origins))


def errors(origins: Origins, forecast: Series) -> Errors:
    return np.asarray(np.abs(origins.future - forecast).mean(1) / origins.scale, dtype=np.float64)


def compared(metric: str, network: Errors, other: Errors, overlap: int) -> Comparison:
    from statsmodels.regression.linear_model import OLS

    difference = network - other
    lags = min(2 * overlap, len(difference) - 1)
    fit: Any = OLS(difference, np.ones(len(difference))).fit(cov_type="HAC", cov_kwds={"maxlags": lags})
    return Comparison(metric, float(network.mean()), float(other.mean()), float(fit.bse[0]))


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
    from threadpoolctl import threadpool_limits

    seasonal = "add" if spec.season > 1 else None
    steps.step("fitting Holt-Winters at every origin, the baseline")
    rows: list[npt.NDArray[np.float64]] = []
    for history, length in zip(origins.history, origins.length, strict=True):
        # One thread: such small matrices cost several threads five times the processor time.
        with threadpool_limits(1), warnings.catch_warnings():
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


def metrics_of(figures: Mapping[str, float], dataset: str, origins: Origins) -> tuple[Metric, ...]:
    return tuple(
        Metric(name=n, value=float(v), dataset=dataset, samples=len(origins.length)) for n, v in figures.items()
    )
