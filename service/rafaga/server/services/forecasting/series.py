"""One series of a request: its values with the gaps filled, its times and covariates, and the model's rows of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import NDArray

from rafaga.bundle import ForecastSpec
from rafaga.calendar import CALENDAR, Times, calendar_feature
from rafaga.errors import InvalidRequest, InvalidTensor, listed, quoted
from rafaga.series import MAX_MISSING, interpolated
from rafaga.server.scheduling.job import Arrays
from rafaga.server.services.forecasting import times
from rafaga.server.services.forecasting.options import Options
from rafaga.server.services.submission import padded
from rafaga.v1 import forecasting_pb2 as pb

Floats = NDArray[np.float32]


class Row(NamedTuple):
    """history: float32 [T], at most the model's max_history. past: covariates, [T, C]; future: [max_horizon, C]."""

    history: Floats
    past: Floats | None = None
    future: Floats | None = None


class Observations(NamedTuple):
    """values: float32 [T]; what is at missing positions does not count. present: bool [T]; None: all. times:
    datetime64[us] [T + steps], with the steps that are forecast. covariates: float32 [T + steps, C].
    """

    values: Floats
    spec: ForecastSpec
    where: str = ""
    present: NDArray[np.bool_] | None = None
    times: Times | None = None
    covariates: Floats | None = None

    def row(self, end: int, continued: Floats | None = None) -> Row:
        """To forecast from position `end` on. `continued`: forecasts to append to the values. Raises InvalidTensor."""
        most = self.spec.max_history
        history = self._filled(min(end, len(self.values)))
        if continued is not None:
            history = np.concatenate((history, continued))[-most:]
        if self.covariates is None:
            return Row(history)
        return Row(history, self.covariates[:end][-most:], self.covariates[end : end + self.spec.max_horizon])

    def times_after(self, steps: int) -> list[Timestamp]:
        """Of the first steps that are forecast; empty for a series without times."""
        return [] if self.times is None else times.messages(self.times[len(self.values) :][:steps])

    @property
    def filled(self) -> int:
        """How many values were filled of those that the model reads."""
        return 0 if self.present is None else int((~self.present[-self.spec.max_history :]).sum())

    def _filled(self, end: int) -> Floats:
        """Those of the first `end` values that the model reads. Values after them fill no gap: a check would know the
        value that it predicts."""
        first = max(0, end - self.spec.max_history)
        values = self.values[first:end]
        if self.present is None or self.present[first:end].all():
            return values
        present = self.present[first:end]
        self._check_gaps(present, first)
        return interpolated(np.where(present, values, np.float32(np.nan)))

    def _check_gaps(self, present: NDArray[np.bool_], first: int) -> None:
        gaps = (np.flatnonzero(~present) + first).tolist()
        count, most = len(present), int(MAX_MISSING * len(present))
        if len(gaps) > most:
            raise InvalidTensor(
                f"{self.where}expected at most {most} missing values ({MAX_MISSING:.0%}) of the {count} up to position "
                f"{first + count - 1}; got {len(gaps)}, one too many at position {gaps[most]}"
            )
        if count - len(gaps) < self.spec.min_history:
            raise InvalidTensor(
                f"{self.where}expected at least {self.spec.min_history} observations, got {count - len(gaps)} and "
                f"missing values from position {gaps[0]} on"
            )


def of_history(values: Sequence[float], options: Options) -> Observations:
    """Raises InvalidTensor, or InvalidRequest if the model needs more than values."""
    if options.spec.covariates:
        raise InvalidRequest("expected `series` instead of `history`: the model has covariates")
    history = np.array(values, np.float32)
    _check_length(history, options.spec, "")
    if not np.isfinite(history).all():
        raise InvalidTensor(f"{_not_finite(history)}: fill the gaps, or send `series` with `missing`")
    return Observations(history, options.spec)


def of_series(series: pb.Series, index: int, options: Options) -> Observations:
    """Raises InvalidTensor or InvalidRequest; messages begin with the series' index and id."""
    spec = options.spec
    where = f"series {index} ({quoted(series.id, 60)}): " if series.id else f"series {index}: "
    values = np.array(series.values, np.float32)
    _check_length(values, spec, where)
    present = _present(series.missing, len(values), where) if series.missing else None
    known = values if present is None else np.where(present, values, np.float32(0))
    if not np.isfinite(known).all():
        raise InvalidTensor(f"{where}{_not_finite(known)}: list missing values in `missing`")
    moments = times.of_series(series, options.frequency, options.steps, where)
    covariates = _covariates(series, moments, options, where) if spec.covariates or series.covariates else None
    return Observations(known, spec, where, present, moments, covariates)


def inputs(rows: Sequence[Row]) -> Arrays:
    """Of the model, in the order that ForecastSpec names."""
    arrays = padded([row.history for row in rows])
    past = [row.past for row in rows if row.past is not None]
    future = [row.future for row in rows if row.future is not None]
    return (*arrays, padded(past)[0], np.stack(future)) if past else arrays


def _check_length(values: Floats, spec: ForecastSpec, where: str) -> None:
    if len(values) < spec.min_history:
        raise InvalidTensor(f"{where}expected at least {spec.min_history} observations, got {len(values)}")


def _not_finite(values: Floats) -> str:
    position = int(np.isfinite(values).argmin())
    return f"expected finite numbers, got {values[position]} at position {position}"


def _present(missing: Sequence[int], count: int, where: str) -> NDArray[np.bool_]:
    positions = np.array(missing, np.int64)
    if falls := np.flatnonzero(np.diff(positions) <= 0).tolist():
        before, after = positions[falls[0] : falls[0] + 2]
        raise InvalidTensor(f"{where}expected rising positions in `missing`, got {after} after {before}")
    if positions[-1] >= count:
        raise InvalidTensor(f"{where}expected positions up to {count - 1} in `missing`, got {positions[-1]}")
    present = np.ones(count, np.bool_)
    present[positions] = False
    return present


def _covariates(series: pb.Series, moments: Times | None, options: Options, where: str) -> Floats:
    """float32 [values + steps, C]. The last value is repeated if the request's horizon ends before the model's."""
    names = options.spec.covariates
    given = [name for name in names if not name.startswith(CALENDAR)]
    if unknown := sorted(series.covariates.keys() - set(given)):
        known = f"the covariates {listed(given)}" if given else "no covariates"
        raise InvalidTensor(f"{where}expected {known}, got {listed(quoted(name, 60) for name in unknown)}")
    if moments is None and len(given) < len(names):
        calendar = listed(name for name in names if name not in given)
        raise InvalidTensor(f"{where}expected `start` or `timestamps`, from which the covariates {calendar} follow")
    count = len(series.values) + options.horizon
    length = len(series.values) + options.steps
    columns = []
    for name in names:
        if name in given:
            values = _covariate(series, name, count, f"{where}covariate {quoted(name, 60)}: ")
            columns.append(np.pad(values, (0, length - count), "edge"))
        else:
            assert moments is not None
            columns.append(calendar_feature(name, moments))
    return np.stack(columns, axis=1)


def _covariate(series: pb.Series, name: str, count: int, where: str) -> Floats:
    if name not in series.covariates:
        raise InvalidTensor(f"{where}expected {count} values, which this model needs; got none")
    values = np.array(series.covariates[name].values, np.float32)
    if len(values) != count:
        raise InvalidTensor(
            f"{where}expected {count} values, one per value of the series and step of the horizon; got {len(values)}"
        )
    if not np.isfinite(values).all():
        raise InvalidTensor(f"{where}{_not_finite(values)}")
    return values
