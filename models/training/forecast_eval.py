"""Rolling-origin evaluation of forecasters on the last fifth of each series, which training never sees.

The whole horizon is forecast from the history before it, every `stride` steps. The seasonal-naive forecast and
Holt-Winters' exponential smoothing, the statistical baseline, forecast the same origins, to show what a network adds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from models.progress import SILENT, Steps
from models.training.data import Series
from rafaga import evaluation
from rafaga.bundle import ForecastSpec, Metric
from rafaga.evaluation import Baseline, Comparison, Errors, baselines_for, compared, standard_error, training_size
from rafaga.series import MAX_MISSING, interpolated

_ROWS = 64  # origins per run

# The inputs of a forecaster (see ForecastSpec) by name -> quantiles float32 [N, max_horizon, Q]
Inputs = Mapping[str, npt.NDArray[Any]]
Forecast = Callable[[Inputs], Series]


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
        found: dict[str, npt.NDArray[Any]] = {"history": self.history, "length": self.length}
        if self.past_covariates.shape[2]:
            found |= {"past_covariates": self.past_covariates, "future_covariates": self.future_covariates}
        return found


def naive_error(series: Series, season: int) -> float:
    """Mean absolute error of the seasonal-naive forecast inside the training part; 0 where it repeats itself."""
    return evaluation.naive_error(series[: training_size(series)], season)


def usable_origins(series: Series, spec: ForecastSpec, start: int, stop: int) -> list[int]:
    """From `start` on, whose whole horizon ends before `stop` and has no missing values (NaN), and whose history would
    be accepted by the server.
    """
    origins = np.arange(max(start, spec.min_history), stop - spec.max_horizon + 1)
    missing = np.concatenate([[0], np.isnan(series).cumsum()])
    length = np.minimum(origins, spec.max_history)
    gaps = missing[origins] - missing[origins - length]
    accepted = (gaps <= (MAX_MISSING * length).astype(int)) & (length - gaps >= spec.min_history)
    found: list[int] = origins[accepted & (missing[origins + spec.max_horizon] == missing[origins])].tolist()
    return found


def rolling_origins(
    series: Series, spec: ForecastSpec, start: int, stop: int, stride: int = 1, covariates: Series | None = None
) -> Origins:
    """Every `stride`-th of the `usable_origins`; there must be one. `covariates`: [T, C]"""
    origins = usable_origins(series, spec, start, stop)[::stride]
    length = np.array([min(origin, spec.max_history) for origin in origins], dtype=np.int64)
    beside = np.zeros((len(series), 0), np.float32) if covariates is None else covariates
    history = np.zeros((len(origins), length.max()), dtype=np.float32)
    past = np.zeros((*history.shape, beside.shape[1]), dtype=np.float32)
    for row, origin in enumerate(origins):
        history[row, : length[row]] = interpolated(series[origin - length[row] : origin])
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
    together: Any = {name: np.concatenate([getattr(p, name) for p in equal]) for name in arrays}
    return replace(equal[0], **together)


def held_out(series: Sequence[Series], spec: ForecastSpec, covariates: Sequence[Series] = ()) -> Origins:
    """The origins of the last fifth of each series, spread evenly: a few hundred in all.

    Fewer with a long season, where Holt-Winters takes seconds at each.
    """
    most = 300 if spec.season <= 24 else 60
    starts = [training_size(one) for one in series]
    stride = max(1, sum(len(one) - start for one, start in zip(series, starts, strict=True)) // most)
    parts = itertools.zip_longest(series, starts, covariates)
    return joined([rolling_origins(one, spec, start, len(one), stride, known) for one, start, known in parts])


def overlap(origins: Origins) -> int:
    """The number of origins that a horizon spans."""
    return math.ceil(int(origins.future.shape[1]) / origins.stride)


def evaluate(origins: Origins, spec: ForecastSpec, quantiles: Series, dataset: str) -> tuple[Metric, ...]:
    """`mase` of the median, `pinball` (mean over levels, in the unit of the series), and the figures of
    `evaluation.shares`. `quantiles`: the forecasts [N, max_horizon, Q]."""
    levels = spec.quantile_levels
    figures = {
        "mase": errors(origins, quantiles[:, :, levels.index(0.5)]),
        "pinball": evaluation.pinball(origins.future, quantiles, levels),
    }
    figures |= {share.name: share.held.mean(1) for share in evaluation.shares(origins.future, quantiles, levels)}
    return metrics_of(figures, dataset, origins)


def quantiles_of(forecast: Forecast, origins: Origins) -> Series:
    """The forecasts at all origins. [N, max_horizon, Q]"""
    rows = (slice(start, start + _ROWS) for start in range(0, len(origins.length), _ROWS))
    return np.concatenate([forecast({name: x[some] for name, x in origins.inputs.items()}) for some in rows])


def baselines(origins: Origins, spec: ForecastSpec, steps: Steps = SILENT) -> Mapping[Baseline, Errors]:
    """The errors of every baseline for such series."""
    return {b: errors(origins, forecast_by(b, origins, spec, steps)) for b in baselines_for(spec.season)}


def comparisons(
    origins: Origins, spec: ForecastSpec, quantiles: Series, others: Mapping[Baseline, Errors]
) -> Iterator[Comparison]:
    """A network's `quantiles` against the baselines `others`, on the same origins."""
    network = errors(origins, quantiles[:, :, spec.quantile_levels.index(0.5)])
    return (compared(baseline, network, other, overlap(origins)) for baseline, other in others.items())


def errors(origins: Origins, forecast: Series) -> Errors:
    """The mean absolute error of each origin's horizon, in the unit of MASE."""
    return evaluation.scaled_errors(origins.future, forecast, origins.scale)


def forecast_by(baseline: Baseline, origins: Origins, spec: ForecastSpec, steps: Steps = SILENT) -> Series:
    """Its mean at every origin. [N, max_horizon]"""
    steps.step(f"forecasting every origin with {baseline.name}, a baseline")
    found = np.zeros_like(origins.future)
    for row, (history, length) in enumerate(zip(origins.history, origins.length, strict=True)):
        found[row] = baseline.forecast(history[:length], spec.season, spec.max_horizon).mean
        steps.advance(row + 1, len(found))
    return found


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
