"""The times of a series: from its start or its timestamps, and as protobuf has them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from rafaga.calendar import FIRST, LAST, Frequency, Times, text
from rafaga.errors import InvalidRequest, InvalidTensor
from rafaga.v1 import forecasting_pb2 as pb

_FIRST_S, _LAST_S = (int(time.astype("datetime64[s]").astype(np.int64)) for time in (FIRST, LAST))
_MAX_NANOS = 10**9 - 1


def of_series(series: pb.Series, frequency: Frequency | None, ahead: int, where: str) -> Times | None:
    """datetime64[us] [values + ahead]; None for a series without times. Raises InvalidRequest, or InvalidTensor."""
    count, starts = len(series.values), series.HasField("start")
    if not (starts or series.timestamps):
        return None
    if starts and series.timestamps:
        raise InvalidRequest(f"{where}expected either `start` or `timestamps`, got both")
    if frequency is None:
        raise InvalidRequest(f"{where}expected `frequency` in the request, because the model does not know its own")
    if series.timestamps and len(series.timestamps) != count:
        raise InvalidTensor(f"{where}expected {count} timestamps, one per value; got {len(series.timestamps)}")
    given = _read([series.start] if starts else series.timestamps, where)
    if place := frequency.mismatch(given[0]):
        raise InvalidTensor(f"{where}position 0: expected {place} (frequency {frequency.name}), got {text(given[0])}")
    try:
        times = frequency.times(given[0], count + ahead)
    except ValueError as error:
        raise InvalidTensor(f"{where}{error}") from None
    if wrong := np.flatnonzero(given != times[: len(given)]).tolist():
        raise InvalidTensor(where + _irregular(given, wrong[0], times, frequency))
    return times


def messages(times: Times) -> list[Timestamp]:
    return [
        Timestamp(seconds=whole, nanos=rest * 1000)
        for whole, rest in (divmod(time, 1_000_000) for time in times.astype(np.int64).tolist())
    ]


def _read(stamps: Iterable[Timestamp], where: str) -> Times:
    """datetime64[us]: smaller parts are cut off."""
    parts = np.array([(stamp.seconds, stamp.nanos) for stamp in stamps])
    seconds, nanos = parts.T
    valid = (seconds >= _FIRST_S) & (seconds <= _LAST_S) & (nanos >= 0) & (nanos <= _MAX_NANOS)
    if not valid.all():
        raise InvalidTensor(f"{where}position {valid.argmin()}: expected a time in the years 1 to 9999")
    microseconds: Times = (seconds * 1_000_000 + nanos // 1000).astype("datetime64[us]")
    return microseconds


def _irregular(given: Times, position: int, times: Times, frequency: Frequency) -> str:
    """Of the first time that is not the expected one; it is not at position 0."""
    before, got, expected = (text(time) for time in (*given[position - 1 : position + 1], times[position]))
    found = f"position {position}: expected {expected} after {before} (frequency {frequency.name}), got "
    if got == before:
        return found + "the same time again"
    later = given[position] > times[position]
    return f"{found}{got}" + (": send a value for every time, and list missing ones in `missing`" if later else "")
