"""Rolling-origin evaluation of forecasters on the last fifth of each series, which training never sees.

The whole horizon is forecast from the history before it, every `stride` steps. The seasonal-naive forecast and
Holt-Winters' exponential smoothing, the statistical baseline, forecast the same origins, to show what a network adds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from models.progress import SILENT, Steps
from models.training.data import Series
from rafaga.bundle import ForecastSpec, Metric

TEST_FRACTION = 0.2
_ROWS = 64  # origins per run
_DRAWS = 2000  # of the bootstrap

# The inputs of a forecaster (see ForecastSpec) by name -> quantiles float32 [N, max_horizon, Q]
Inputs = Mapping[str, npt.NDArray[Any]]
Forecast = Callable[[Inputs], Series]
Errors = npt.NDArray[np.float64]  # [N]: a figure of each origin's horizon, such as its mean absolute error


@dataclass(frozen=True)
class Origins:
    """Rows of `history` end where the rows of `future` float32 [N, max_horizon] begin. C covariates may be none."""

    history: Series
    length: npt.NDArray[np.int64]
    future: Series
    # [N]: mean absolute error of the seasonal-naive forecast inside the training part, the unit of MASE
    scale: npt.NDArray[np.float64]
    series: npt.NDArray[np.int64]  # [N]: the number of its series
    past_covariates: Series  # [N, T, C]
    future_covariates: Series  # [N, max_horizon, C]
    stride: int  # steps from one origin to the next

    @property
    def inputs(self) -> Inputs:
        found = {"history": self.history, "length": self.length}
        if self.past_covariates.shape[2]:
            found |= {"past_covariates": self.past_covariates, "future_covariates": self.future_covariates}
        return found


def training_size(series: Series) -> int:
    """The number of observations for training."""
    return len(series) - int(len(series) * TEST_FRACTION)


def naive_error(series: Series, season: int) -> float:
    """Mean absolute error of the seasonal-naive forecast inside the training part; 0 where it repeats itself."""
    seen = series[: training_size(series)]
    return float(np.abs(seen[season:] - seen[:-season]).mean())


def rolling_origins(
    series: Series, spec: ForecastSpec, start: int, stop: int, stride: int = 1, covariates: Series | None = None
) -> Origins:
    """Origins `start`, `start + stride`, ... whose whole horizon ends before `stop`. `covariates`: [T, C]"""
    origins = range(max(start, spec.min_history), stop - spec.max_horizon + 1, stride)
    length = np.array([min(origin, spec.max_history) for origin in origins], dtype=np.int64)
    beside = np.zeros((len(series), 0), np.float32) if covariates is None else covariates
    history = np.zeros((len(origins), length.max()), dtype=np.float32)
    past = np.zeros((*history.shape, beside.shape[1]), dtype=np.float32)
    for row, origin in enumerate(origins):
        history[row, : length[row]] = series[origin - length[row] : origin]
        past[row, : length[row]] = beside[origin - length[row] : origin]
    future, known = (np.stack([x[origin : origin + spec.max_horizon] for origin in origins]) for x in (series, beside))
    scale = np.full(len(origins), naive_error(series, spec.season))
    return Origins(history, length, future, scale, np.zeros(len(origins), np.int64), past, known, stride)


def joined(parts: Sequence[Origins]) -> Origins:
    """The origins of several series, with one stride, one series after the other."""
    longest = max(part.history.shape[1] for part in parts)

    def padded(x: Series) -> Series:
        return np.pad(x, ((0, 0), (0, longest - x.shape[1]), *((0, 0),) * (x.ndim - 2)))

    equal = [
        replace(p, history=padded(p.history), past_covariates=padded(p.past_covariates), series=p.series + number)
        for number, p in enumerate(parts)
    ]
    arrays = [field.name for field in fields(Origins) if field.name != "stride"]
    return replace(equal[0], **{name: np.concatenate([getattr(p, name) for p in equal]) for name in arrays})


def held_out(series: Sequence[Series], spec: ForecastSpec, covariates: Sequence[Series] = ()) -> Origins:
    """The origins of the last fifth of each series, spread evenly: a few hundred in all.

    Fewer with a long season, where Holt-Winters takes seconds at each.
    """
    most = 300 if spec.season <= 24 else 60
    starts = [training_size(one) for one in series]
    stride = max(1, sum(len(one) - start for one, start in zip(series, starts, strict=True)) // most)
    beside = covariates or [None] * len(series)
    parts = zip(series, starts, beside, strict=True)
    return joined([rolling_origins(one, spec, start, len(one), stride, known) for one, start, known in parts])


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
        "mase": errors(origins, quantiles[:, :, spec.quantile_levels.index(0.5)]),
        "pinball": np.maximum(levels * error, (levels - 1) * error).mean((1, 2), dtype=np.float64),
    }
    figures |= {share.name: share.held.mean(1) for share in shares(origins, spec, quantiles)}
    return metrics_of(figures, dataset, origins)


def quantiles_of(forecast: Forecast, origins: Origins) -> Series:
    """The forecasts at all origins. [N, max_horizon, Q]"""
    rows = (slice(start, start + _ROWS) for start in range(0, len(origins.length), _ROWS))
    return np.concatenate([forecast({name: x[some] for name, x in origins.inputs.items()}) for some in rows])


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
        yield Share(coverage_name(levels, low, high), levels[high] - levels[low], inside)
    for number, level in enumerate(levels):
        yield Share(f"coverage_q{f'{100 * level:g}'.zfill(2)}", level, below[:, :, number])


def standard_error(each: Errors, block: int, series: npt.NDArray[np.int64] | None = None, seed: int = 0) -> float:
    """Of the mean of `each`, by a moving-block bootstrap with blocks of `block` origins (Künsch 1989). 0: unknown.

    `series` [N]: the number of each origin's series; default: all are of one. Series are taken as independent.
    """
    parts = [each] if series is None else [each[series == number] for number in np.unique(series)]
    shares = [len(part) / len(each) for part in parts]
    return math.hypot(*(share * _bootstrapped(part, block, seed) for share, part in zip(shares, parts, strict=True)))


def _bootstrapped(each: Errors, block: int, seed: int) -> float:
    block = min(block, len(each))
    starts = np.random.default_rng(seed).integers(0, len(each) - block + 1, (_DRAWS, -(-len(each) // block)))
    drawn = (starts[:, :, None] + np.arange(block)).reshape(_DRAWS, -1)[:, : len(each)]
    return float(each[drawn].mean(axis=1).std())


def coverage_name(levels: Sequence[float], low: int, high: int) -> str:
    """Of the figure of the interval between two levels, given by their positions."""
    return f"coverage_{round(100 * (levels[high] - levels[low]))}"


def intervals(levels: tuple[float, ...]) -> Iterator[tuple[int, int]]:
    """Pairs of levels symmetric around the median, widest first."""
    return ((i, len(levels) - 1 - i) for i in range(len(levels) // 2))


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


def baselines(origins: Origins, spec: ForecastSpec, steps: Steps = SILENT) -> Mapping[str, Errors]:
    """The errors of every baseline for such series, by the name of its figure."""
    found = {"mase_seasonal_naive": errors(origins, seasonal_naive(origins, spec))}
    if spec.season == 1:
        found["mase_drift"] = errors(origins, drift(origins))
    return found | {"mase_holt_winters": errors(origins, holt_winters(origins, spec, steps))}


def comparisons(
    origins: Origins, spec: ForecastSpec, quantiles: Series, others: Mapping[str, Errors]
) -> Iterator[Comparison]:
    """A network's `quantiles` against the baselines `others`, on the same origins."""
    network = errors(origins, quantiles[:, :, spec.quantile_levels.index(0.5)])
    return (compared(metric, network, other, overlap(origins)) for metric, other in others.items())


def errors(origins: Origins, forecast: Series) -> Errors:
    """The mean absolute error of each origin's horizon, in the unit of MASE."""
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


def metrics_of(figures: Mapping[str, Errors], dataset: str, origins: Origins) -> tuple[Metric, ...]:
    """The mean of each figure, with its standard error."""
    return tuple(
        Metric(
            name=name,
            value=float(each.mean()),
            dataset=dataset,
            samples=len(each),
            standard_error=standard_error(each, overlap(origins), origins.series),
        )
        for name, each in figures.items()
    )
