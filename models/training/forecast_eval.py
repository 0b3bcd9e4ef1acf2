"""Rolling-origin evaluation of forecasters on the last fifth of each series, which training never sees.

The whole horizon is forecast from the history before it, every `stride` steps. The seasonal-naive forecast and
Holt-Winters' exponential smoothing, the statistical baseline, forecast the same origins, to show what a network adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.progress import SILENT, Steps
from models.training.data import Series
from rafaga import evaluation
from rafaga.bundle import ForecastSpec, Metric
from rafaga.evaluation import Baseline, Comparison, baselines, compared

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
    # [N]: mean absolute error of the seasonal-naive forecast inside the training part, the unit of MASE
    scale: npt.NDArray[np.float64]
    stride: int  # steps from one origin to the next


def training_size(series: Series) -> int:
    """The number of observations for training."""
    return len(series) - int(len(series) * TEST_FRACTION)


def naive_error(series: Series, season: int) -> float:
    """Mean absolute error of the seasonal-naive forecast inside the training part; 0 where it repeats itself."""
    return evaluation.naive_error(series[: training_size(series)], season)


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
    """`mase` of the median, `pinball` (mean over levels, in the unit of the series), and the figures of
    `evaluation.shares`. `quantiles`: the forecasts [N, max_horizon, Q]."""
    levels = spec.quantile_levels
    figures = {
        "mase": float(errors(origins, quantiles[:, :, levels.index(0.5)]).mean()),
        "pinball": float(evaluation.pinball(origins.future, quantiles, levels).mean()),
    }
    figures |= {share.name: float(share.held.mean()) for share in evaluation.shares(origins.future, quantiles, levels)}
    return metrics_of(figures, dataset, origins)


def quantiles_of(forecast: Forecast, origins: Origins) -> Series:
    """The forecasts at all origins. [N, max_horizon, Q]"""
    rows = (slice(start, start + _ROWS) for start in range(0, len(origins.length), _ROWS))
    return np.concatenate([forecast(origins.history[some], origins.length[some]) for some in rows])


def comparisons(origins: Origins, spec: ForecastSpec, quantiles: Series, steps: Steps = SILENT) -> Iterator[Comparison]:
    """A network's `quantiles` against every baseline for its series, on the same origins."""
    network = errors(origins, quantiles[:, :, spec.quantile_levels.index(0.5)])
    for baseline in baselines(spec.season):
        other = errors(origins, forecast_by(baseline, origins, spec, steps))
        yield compared(baseline, network, other, overlap(origins))


def errors(origins: Origins, forecast: Series) -> evaluation.Errors:
    return evaluation.scaled_errors(origins.future, forecast, origins.scale)


def forecast_by(baseline: Baseline, origins: Origins, spec: ForecastSpec, steps: Steps = SILENT) -> Series:
    """Its mean at every origin. [N, max_horizon]"""
    steps.step(f"forecasting every origin with {baseline.name}, a baseline")
    found = np.zeros_like(origins.future)
    for row, (history, length) in enumerate(zip(origins.history, origins.length, strict=True)):
        found[row] = baseline.forecast(history[:length], spec.season, spec.max_horizon).mean
        steps.advance(row + 1, len(found))
    return found


def metrics_of(figures: Mapping[str, float], dataset: str, origins: Origins) -> tuple[Metric, ...]:
    return tuple(
        Metric(name=n, value=float(v), dataset=dataset, samples=len(origins.length)) for n, v in figures.items()
    )
