"""Forecasts, with their tables and charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rafaga.client import _html
from rafaga.client._history import Asked, History, clock_to_utc, times_of
from rafaga.client._results import Float32Array, ModelInfo, Timing, model_info, rounded, timing
from rafaga.errors import InternalError
from rafaga.v1 import forecasting_pb2

# How much of the history a chart shows, in horizons.
_HORIZONS_DRAWN = 4


@dataclass(frozen=True)
class ObservationCheck:
    """An observation and the interval that was forecast for it one step before, the widest that the model gives."""

    position: int  # in the history, from 0
    observed: float
    lower: float
    upper: float
    score: float  # distance from the interval's centre in halves of its width: above 1 is outside
    anomaly: bool


@dataclass(frozen=True, eq=False)
class Forecast:
    """A forecast, in the unit of the history.

    levels: rising quantile levels. values: float32 [len(levels), horizon]. history: the series that it continues.
    timestamps: datetime64 [horizon], in UTC if those of the history have a zone; None for a series without times.
    filled: how many missing values of the history were filled. checks: of its last observations, as many as
    `check_last` asked for. id: of the history.
    """

    levels: tuple[float, ...]
    values: Float32Array
    model: ModelInfo
    timing: Timing
    history: History | None = field(default=None, repr=False)
    timestamps: npt.NDArray[np.datetime64] | None = field(default=None, repr=False)
    filled: int = 0
    checks: tuple[ObservationCheck, ...] = field(default=(), repr=False)
    id: str = ""

    @property
    def horizon(self) -> int:
        """How many steps were forecast."""
        return int(self.values.shape[1])

    @property
    def median(self) -> Float32Array:
        """The median, float32 [horizon]. ValueError without the level 0.5."""
        return self.quantile(0.5)

    def quantile(self, level: float) -> Float32Array:
        """float32 [horizon]: the values that the truth falls below with probability `level`.

        ValueError for a level that the forecast does not have; `quantiles=` asks the server for others.
        """
        for row, known in enumerate(self.levels):
            if math.isclose(known, level, abs_tol=1e-6):
                quantile: Float32Array = self.values[row]
                return quantile
        raise ValueError(f"no quantile {level:g}; the forecast has {', '.join(f'{known:g}' for known in self.levels)}")

    def interval(self, coverage: float) -> tuple[Float32Array, Float32Array]:
        """(lower, upper), float32 [horizon] each: the central interval that holds the truth with that probability.

        `interval(0.8)` lies between the quantiles 0.1 and 0.9. ValueError as for `quantile`.
        """
        return self.quantile((1 - coverage) / 2), self.quantile((1 + coverage) / 2)

    def to_pandas(self) -> Any:
        """A DataFrame with a row per step and a column per quantile: q0.1, q0.5, …

        Its index has the times of the steps, and continues a DatetimeIndex or PeriodIndex of the history; without times
        it counts the steps, from 1.
        """
        import pandas

        columns = [f"q{level:g}" for level in self.levels]
        return pandas.DataFrame(self.values.T, index=self._steps(), columns=columns)

    @property
    def anomalies(self) -> tuple[ObservationCheck, ...]:
        """The checked observations outside their interval."""
        return tuple(check for check in self.checks if check.anomaly)

    def checks_to_pandas(self) -> Any:
        """A DataFrame of `checks`: observed, lower, upper, score, anomaly. Its index is that of the history, or has the
        positions in it."""
        import pandas

        positions = [check.position for check in self.checks]
        index = self.history.index if self.history else None
        columns = ("observed", "lower", "upper", "score", "anomaly")
        return pandas.DataFrame(
            [[getattr(check, name) for name in columns] for check in self.checks],
            index=pandas.Index(positions, name="position") if index is None else index[positions],
            columns=columns,
        )

    def plot(self, axes: Any = None) -> Any:
        """Draws the end of the history, the median and the intervals around it, and anomalies, with matplotlib.

        axes: where to draw; None makes a figure. Returns the axes.
        """
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.figure(figsize=(8, 4), layout="constrained").add_subplot()
        before, after = self._times()
        values = self.values.T
        if self.history is not None and len(before):
            past = self.history.values[-len(before) :]
            axes.plot(before, past, color="0.4", label="history")
            self._plot_anomalies(axes, before)
            if np.isfinite(past[-1]):  # the forecast begins where the history ends
                after = before[-1:].append(after) if hasattr(before, "append") else np.append(before[-1:], after)
                values = np.concatenate([np.full((1, len(self.levels)), past[-1]), values])
        middle = min(range(len(self.levels)), key=lambda row: abs(self.levels[row] - 0.5))
        name = "median" if self.levels[middle] == 0.5 else f"quantile {self.levels[middle]:g}"
        axes.plot(after, values[:, middle], color="tab:blue", label=f"forecast, {name}")
        intervals = self._intervals()
        for number, (low, high) in enumerate(intervals, start=1):
            style = {"color": _blue(0.15 + 0.35 * number / len(intervals)), "linewidth": 0, "zorder": 1}
            label = f"{100 * (self.levels[high] - self.levels[low]):g} % interval"
            axes.fill_between(after, values[:, low], values[:, high], label=label, **style)
        axes.set_title(f"{self.id}, {self.model}" if self.id else str(self.model))
        axes.legend()
        return axes

    def __repr__(self) -> str:
        steps = np.array2string(self.values[len(self.levels) // 2], precision=4, threshold=6, separator=", ")
        last = ""
        if len(self.levels) > 1:
            low, high = self.values[0, -1], self.values[-1, -1]
            last = f", last {low:.5g} to {high:.5g} ({100 * (self.levels[-1] - self.levels[0]):g} %)"
        return f"Forecast({steps}{last}, horizon={self.horizon}, model={str(self.model)!r})"

    def _repr_html_(self) -> str:
        rows = [(step, *values) for step, values in enumerate(self.values.T, start=1)]
        return _html.table(self.model, ("step", *(f"{level:g}" for level in self.levels)), rows)

    def _intervals(self) -> list[tuple[int, int]]:
        """Rows of levels symmetric around the median, widest first."""
        rows = range(len(self.levels))
        return [
            (low, high)
            for low in rows
            for high in rows[low + 1 :]
            if math.isclose(self.levels[low] + self.levels[high], 1, abs_tol=1e-6)
        ]

    def _plot_anomalies(self, axes: Any, before: Any) -> None:
        assert self.history is not None
        first = len(self.history.values) - len(before)
        shown = [check for check in self.anomalies if check.position >= first]
        if shown:
            positions = [check.position - first for check in shown]
            axes.scatter(
                before[positions], [check.observed for check in shown], color="tab:red", zorder=3, label="anomaly"
            )

    def _steps(self) -> Any:
        """The index of the steps, as that of the history."""
        import pandas

        index = self.history.index if self.history else None
        if isinstance(index, pandas.PeriodIndex):
            return pandas.period_range(index[-1], periods=self.horizon + 1, name=index.name)[1:]
        if self.timestamps is not None:
            found = pandas.DatetimeIndex(self.timestamps, name=getattr(index, "name", None))
            if isinstance(index, pandas.DatetimeIndex):
                found = found.as_unit(index.unit)
                return found if index.tz is None else found.tz_localize("UTC").tz_convert(index.tz)
            return found
        if isinstance(index, pandas.DatetimeIndex):  # of a frequency that only pandas knows
            frequency = pandas.DatetimeIndex(index, freq="infer").freq
            if frequency is not None:
                return pandas.date_range(index[-1], periods=self.horizon + 1, freq=frequency, name=index.name)[1:]
        return pandas.RangeIndex(1, self.horizon + 1, name="step")

    def _times(self) -> tuple[Any, Any]:
        """Positions of the history's end and of the steps on the axis: times, or steps counted from the last value."""
        shown = 0 if self.history is None else min(len(self.history.values), _HORIZONS_DRAWN * self.horizon)
        index = None if self.history is None else self.history.index
        if isinstance(index, np.ndarray) and self.timestamps is not None:
            return index[-shown:], self.timestamps
        if index is not None and hasattr(index, "dtype"):
            before, after = index[-shown:], self._steps()
            if hasattr(after, "to_timestamp"):
                before, after = before.to_timestamp(), after.to_timestamp()
            if after.dtype.kind == "M":
                return before, after
        return np.arange(1 - shown, 1), np.arange(1, self.horizon + 1)


def forecasts(reply: forecasting_pb2.ForecastResponse, asked: Sequence[Asked]) -> list[Forecast]:
    """One per series. InternalError where the reply does not answer what was asked."""
    found = list(reply.forecasts) or [forecasting_pb2.SeriesForecast(quantiles=reply.quantiles)]
    if len(found) != len(asked):
        raise InternalError(f"expected forecasts of {len(asked)} series, the reply has {len(found)}")
    model, spent = model_info(reply.model), timing(reply.timing)
    return [
        Forecast(
            rounded([q.level for q in each.quantiles]),
            _values(each.quantiles),
            model,
            spent,
            one.history,
            clock_to_utc(times_of(each.timestamps), one.history.index, one.frequency) if each.timestamps else None,
            each.filled,
            tuple(ObservationCheck(c.position, c.observed, c.lower, c.upper, c.score, c.anomaly) for c in each.checks),
            one.history.id,
        )
        for each, one in zip(found, asked, strict=True)
    ]


def _values(quantiles: Sequence[forecasting_pb2.QuantileForecast]) -> Float32Array:
    lengths = {len(q.values) for q in quantiles}
    if len(lengths) != 1:
        raise InternalError(f"expected quantiles of one length, the reply has lengths {sorted(lengths)}")
    values = np.array([q.values for q in quantiles], dtype=np.float32)
    values.flags.writeable = False
    return values


def _blue(strength: float) -> tuple[float, ...]:
    """Between white, 0, and the colour of the median."""
    return tuple(1 - strength * (1 - part) for part in (0.12, 0.47, 0.71))
