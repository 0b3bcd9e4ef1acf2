"""Forecasts: the series they continue, and their tables and charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rafaga.client import _html
from rafaga.client._frames import SeriesInput, column
from rafaga.client._results import Float32Array, ModelInfo, Timing, model_info, rounded, timing
from rafaga.errors import InternalError, InvalidTensor
from rafaga.v1 import forecasting_pb2

# How much of the history a chart shows, in horizons.
_HORIZONS_DRAWN = 4


class History(NamedTuple):
    """values: float32 [T], oldest first. index: of the pandas Series that they came from, or None."""

    values: Float32Array
    index: Any = None


@dataclass(frozen=True, eq=False)
class Forecast:
    """A forecast, in the unit of the history.

    levels: rising quantile levels. values: float32 [len(levels), horizon]. history: the series that it continues.
    """

    levels: tuple[float, ...]
    values: Float32Array
    model: ModelInfo
    timing: Timing
    history: History | None = field(default=None, repr=False)

    @property
    def horizon(self) -> int:
        """How many steps were forecast."""
        return int(self.values.shape[1])

    @property
    def median(self) -> Float32Array:
        """The median, float32 [horizon]. ValueError if the model has no level 0.5."""
        return self.quantile(0.5)

    def quantile(self, level: float) -> Float32Array:
        """float32 [horizon]: the values that the truth falls below with probability `level`.

        ValueError for a level the model does not give; nothing is interpolated.
        """
        for row, known in enumerate(self.levels):
            if math.isclose(known, level, abs_tol=1e-6):
                quantile: Float32Array = self.values[row]
                return quantile
        raise ValueError(f"no quantile {level:g}; the model gives {', '.join(f'{known:g}' for known in self.levels)}")

    def interval(self, coverage: float) -> tuple[Float32Array, Float32Array]:
        """(lower, upper), float32 [horizon] each: the central interval that holds the truth with that probability.

        `interval(0.8)` lies between the quantiles 0.1 and 0.9. ValueError as for `quantile`.
        """
        return self.quantile((1 - coverage) / 2), self.quantile((1 + coverage) / 2)

    def to_pandas(self) -> Any:
        """A DataFrame with a row per step and a column per quantile: q0.1, q0.5, …

        Its index continues that of the history, if this was a Series with a PeriodIndex or a DatetimeIndex whose
        frequency can be inferred; otherwise it counts the steps, from 1.
        """
        import pandas

        columns = [f"q{level:g}" for level in self.levels]
        return pandas.DataFrame(self.values.T, index=self._steps(), columns=columns)

    def plot(self, axes: Any = None) -> Any:
        """Draws the end of the history, the middle quantile, and the intervals around it, with matplotlib.

        axes: where to draw; None makes a figure. Returns the axes.
        """
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.figure(figsize=(8, 4), layout="constrained").add_subplot()
        before, after = self._times()
        if self.history is not None and len(before):
            axes.plot(before, self.history.values[-len(before) :], color="0.4", label="history")
        middle = len(self.levels) // 2
        name = "median" if self.levels[middle] == 0.5 else f"quantile {self.levels[middle]:g}"
        axes.plot(after, self.values[middle], color="tab:blue", label=f"forecast, {name}")
        for row in range(middle):
            low, high = self.levels[row], self.levels[-1 - row]
            style = {"color": "tab:blue", "alpha": 0.2, "linewidth": 0}
            label = f"{100 * (high - low):g} % interval"
            axes.fill_between(after, self.values[row], self.values[-1 - row], label=label, **style)
        axes.set_title(str(self.model))
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

    def _steps(self) -> Any:
        import pandas

        index = self.history.index if self.history else None
        if isinstance(index, pandas.PeriodIndex):
            return pandas.period_range(index[-1], periods=self.horizon + 1, name=index.name)[1:]
        if isinstance(index, pandas.DatetimeIndex):
            frequency = pandas.DatetimeIndex(index, freq="infer").freq
            if frequency is not None:
                return pandas.date_range(index[-1], periods=self.horizon + 1, freq=frequency, name=index.name)[1:]
        return pandas.RangeIndex(1, self.horizon + 1, name="step")

    def _times(self) -> tuple[Any, Any]:
        """Positions of the history's end and of the steps on the axis: times, or steps counted from the last value."""
        shown = 0 if self.history is None else min(len(self.history.values), _HORIZONS_DRAWN * self.horizon)
        if self.history is not None and self.history.index is not None:
            before, after = self.history.index[-shown:], self._steps()
            if hasattr(after, "to_timestamp"):
                before, after = before.to_timestamp(), after.to_timestamp()
            if after.dtype.kind == "M":
                return before, after
        return np.arange(1 - shown, 1), np.arange(1, self.horizon + 1)


def history(values: SeriesInput) -> History:
    """float32 [T], finite. Raises InvalidTensor."""
    given = column(values)
    try:
        series = np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError):
        raise InvalidTensor("the history must be numbers, oldest first") from None
    if series.ndim != 1 or not series.size:
        raise InvalidTensor(f"the history must be one row of numbers [T], got shape {list(series.shape)}")
    bad = np.flatnonzero(~np.isfinite(series))
    if bad.size:
        raise InvalidTensor(
            f"the history must be finite; {bad.size} of {series.size} values are not, the first at position {bad[0]}: "
            "fill the gaps first"
        )
    index: Any = getattr(given, "index", None)
    if not hasattr(index, "dtype"):  # the method of lists and tuples
        return History(series)
    if index.dtype.kind == "M" and not index.is_monotonic_increasing:
        raise InvalidTensor("the history must be in order of time, oldest first: series.sort_index()")
    return History(series, index)


def forecasts(reply: forecasting_pb2.ForecastResponse, histories: Sequence[History]) -> list[Forecast]:
    """One per series. InternalError where the reply does not answer what was asked."""
    found = [each.quantiles for each in reply.forecasts] or [reply.quantiles]
    if len(found) != len(histories):
        raise InternalError(f"expected forecasts of {len(histories)} series, the reply has {len(found)}")
    model, spent = model_info(reply.model), timing(reply.timing)
    return [
        Forecast(rounded([q.level for q in quantiles]), _values(quantiles), model, spent, series)
        for quantiles, series in zip(found, histories, strict=True)
    ]


def _values(quantiles: Sequence[forecasting_pb2.QuantileForecast]) -> Float32Array:
    lengths = {len(q.values) for q in quantiles}
    if len(lengths) != 1:
        raise InternalError(f"expected quantiles of one length, the reply has lengths {sorted(lengths)}")
    values = np.array([q.values for q in quantiles], dtype=np.float32)
    values.flags.writeable = False
    return values
