"""The series that a forecast continues: values, gaps, times and covariates, of lists, arrays and pandas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from google.protobuf.timestamp_pb2 import Timestamp

from rafaga import calendar
from rafaga.client._frames import Convertible, column
from rafaga.client._results import Float32Array
from rafaga.errors import InvalidTensor
from rafaga.v1 import forecasting_pb2


class History(NamedTuple):
    """One series with all that belongs to it. Forecasts take one in the place of values.

    values: float32 [T], oldest first; NaN where missing. index: of the pandas Series that they came from; or their
    times, datetime64 [T], in UTC; or None. covariates: by name, [T + horizon] each: what is known in advance. id: its
    forecast gets it back; that of a pandas Series is its name.
    """

    values: Float32Array
    index: Any = None
    covariates: Mapping[str, npt.ArrayLike] | None = None
    id: str = ""


SeriesInput: TypeAlias = Sequence[float | None] | Convertible | History
"""Evenly spaced observations [T], oldest first. Missing ones are None in a list and NaN in a pandas Series."""


class Asked(NamedTuple):
    """A series, and its part of a request. `frequency`: None without times."""

    history: History
    message: forecasting_pb2.Series
    frequency: calendar.Frequency | None

    @property
    def plain(self) -> bool:
        """Whether it has values only."""
        return [field.name for field, _ in self.message.ListFields()] == ["values"]


def asked(given: SeriesInput, covariates: Mapping[str, npt.ArrayLike] | None = None) -> Asked:
    """Checks one series. Raises InvalidTensor."""
    if isinstance(given, History):
        history = given._replace(values=_values(given.values, gaps=True))
    else:
        series: Any = column(given)
        index = getattr(series, "index", None)
        if hasattr(index, "dtype"):  # of pandas; lists and tuples have a method of that name
            name = "" if series.name is None else str(series.name)
            history = History(_values(series, gaps=True), index, id=name)
        else:
            history = History(_values(series, gaps=False))
    if covariates is not None:
        history = history._replace(covariates=covariates)
    missing = np.isnan(history.values)
    message = forecasting_pb2.Series(values=np.where(missing, np.float32(0), history.values), id=history.id)
    message.missing.extend(np.flatnonzero(missing).tolist())
    for name, known in ({} if history.covariates is None else history.covariates).items():
        message.covariates[str(name)].values.extend(_covariate(str(name), known))
    frequency = _put_start(message, history.index) if history.index is not None else None
    return Asked(history, message, frequency)


def several(series: Iterable[SeriesInput]) -> Iterable[SeriesInput]:
    """Of a frame, its columns."""
    frame: Any = series
    return [frame.iloc[:, i] for i in range(len(frame.columns))] if hasattr(series, "columns") else series


def _values(given: Any, gaps: bool) -> Float32Array:
    """float32 [T], NaN where missing. gaps: whether NaN means that; None always does."""
    try:
        of_pandas = hasattr(given, "isna")
        values = given.to_numpy(np.float32, na_value=np.nan) if of_pandas else np.asarray(given, np.float32)
    except (TypeError, ValueError):
        raise InvalidTensor("the history must be numbers, oldest first") from None
    if values.ndim != 1 or not values.size:
        raise InvalidTensor(f"the history must be one row of numbers [T], got shape {list(values.shape)}")
    wrong = [
        position
        for position in np.flatnonzero(~np.isfinite(values))
        if not (np.isnan(values[position]) and (gaps or given[position] is None))
    ]
    if wrong:
        raise InvalidTensor(
            f"the history must be finite; {len(wrong)} of {values.size} values are not, the first at position "
            f"{wrong[0]}: mark missing values as None in a list, or as NaN in a pandas Series"
        )
    return np.asarray(values)


def _covariate(name: str, known: npt.ArrayLike) -> Float32Array:
    try:
        values = np.asarray(known, np.float32)
    except (TypeError, ValueError):
        raise InvalidTensor(f"covariate {name!r} must be numbers, one per value and step of the horizon") from None
    if values.ndim != 1 or not np.isfinite(values).all():
        raise InvalidTensor(f"covariate {name!r} must be one row of finite numbers, got shape {list(values.shape)}")
    return values


def _put_start(message: forecasting_pb2.Series, index: Any) -> calendar.Frequency | None:
    """Sets `start` if the index has times with a frequency that servers know. Raises InvalidTensor for irregular ones.

    Times with a zone are sent as its clock shows them, so that days begin at midnight; those closer than a day, in UTC.
    """
    times = _clock(index)
    if times is None:
        return None
    _check_order(times)
    known: str | None = getattr(index, "freqstr", None) if hasattr(index, "tz") else None
    frequency = _named(known) if known else calendar.inferred(times)
    zone = getattr(index, "tz", None)
    if zone is not None and (frequency is None or frequency.intraday):
        times = index.tz_convert(None).to_numpy().astype("datetime64[us]")
        frequency = frequency or calendar.inferred(times)
    if frequency is not None:
        message.start.CopyFrom(_timestamp(times[0]))
    elif not known and len(times) > 2 and not _regular(index):
        raise _irregular(times)
    return frequency


def clock_to_utc(times: calendar.Times, index: Any, frequency: calendar.Frequency | None) -> calendar.Times:
    """Undoes what `_put_start` does to times with a zone."""
    zone = getattr(index, "tz", None)
    if zone is None or frequency is None or frequency.intraday:
        return times
    import pandas

    first = np.zeros(len(times), bool)  # of an hour that comes twice, the second
    local = pandas.DatetimeIndex(times).tz_localize(zone, ambiguous=first, nonexistent="shift_forward")
    utc: calendar.Times = local.tz_convert(None).to_numpy()
    return utc


def _clock(index: Any) -> calendar.Times | None:
    """datetime64[us] [T], without the zone; of periods, their starts. None for an index of another kind."""
    if hasattr(index, "to_timestamp"):
        index = index.to_timestamp()
    if getattr(index, "tz", None) is not None:
        index = index.tz_localize(None)
    times = np.asarray(index)
    return times.astype("datetime64[us]") if times.dtype.kind == "M" else None


def _check_order(times: calendar.Times) -> None:
    if np.isnat(times).any():
        raise InvalidTensor(f"the history has no time at position {np.isnat(times).argmax()}")
    steps = np.diff(times).astype(np.int64)
    if (steps < 0).any():
        raise InvalidTensor("the history must be in order of time, oldest first: series.sort_index()")
    if (steps == 0).any():
        position = int((steps == 0).argmax())
        twice = calendar.text(times[position])
        raise InvalidTensor(f"the history has the time {twice} twice, at positions {position} and {position + 1}")


def _regular(index: Any) -> Any:
    """Whether pandas finds a frequency, although servers do not know it."""
    if not hasattr(index, "freqstr"):
        return False
    import pandas

    return (np.diff(index.asi8) == 1).all() if hasattr(index, "to_timestamp") else pandas.infer_freq(index) is not None


def _irregular(times: calendar.Times) -> InvalidTensor:
    position = calendar.irregular(times)
    before, after = map(calendar.text, times[position - 1 : position + 1])
    return InvalidTensor(
        f"the times of the history must be evenly spaced: at position {position}, {after} follows {before}. Mark gaps "
        "as missing values, series.asfreq('D') for days, or leave the times out, series.reset_index(drop=True)"
    )


def _named(alias: str) -> calendar.Frequency | None:
    try:
        return calendar.frequency(alias)
    except ValueError:
        return None


def _timestamp(time: np.datetime64) -> Timestamp:
    seconds, microseconds = divmod(int(time.astype(np.int64)), 1_000_000)
    return Timestamp(seconds=seconds, nanos=1000 * microseconds)


def times_of(stamps: Sequence[Timestamp]) -> calendar.Times:
    """datetime64[us] [T]"""
    return np.array([s.seconds * 1_000_000 + s.nanos // 1000 for s in stamps], np.int64).astype("datetime64[us]")
