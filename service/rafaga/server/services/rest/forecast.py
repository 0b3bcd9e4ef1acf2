"""The body of a forecast: a series as JSON or CSV. Null is a missing value, and times are written as RFC 3339 says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Self

from google.protobuf.timestamp_pb2 import Timestamp
from msgspec import Meta, Struct

from rafaga.errors import InvalidRequest, InvalidTensor, quoted
from rafaga.series import SeriesError, read_series
from rafaga.server.services.rest.conversion import Count, text_of
from rafaga.v1 import forecasting_pb2 as pb

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Values = Annotated[list[float | None], Meta(description="null: missing")]
Time = Annotated[str, Meta(description="RFC 3339: 2024-01-31T00:00:00Z, or 2024-01-31")]


class Series(Struct, forbid_unknown_fields=True):
    values: Values
    id: str = ""
    start: Time | None = None
    timestamps: list[Time] = []
    covariates: Annotated[dict[str, list[float]], Meta(description="one number per value, then one per step")] = {}


class Forecast(Struct, forbid_unknown_fields=True):
    history: list[float] = []
    series: list[Values | Series] = []
    horizon: Count = 0
    frequency: str = ""
    quantiles: list[float] = []
    check_last: Count = 0

    @classmethod
    def of_raw(cls, body: bytes, query: Mapping[str, str]) -> Self:
        try:
            return cls(history=read_series(text_of(body).splitlines(), query.get("column")))
        except SeriesError as error:
            raise InvalidTensor(f"CSV: {str(error).replace('--column', '?column=')}") from None

    @property
    def given(self) -> dict[str, object]:
        return {"history": self.history, "series": [_message(each, i) for i, each in enumerate(self.series)]}


def _message(series: Series | list[float | None], index: int) -> pb.Series:
    if isinstance(series, list):
        return message(series)
    found = message(series.values, series.id)
    found.timestamps.extend(
        timestamp(text, f"series {index}: position {i}") for i, text in enumerate(series.timestamps)
    )
    for name, values in series.covariates.items():
        found.covariates[name].values.extend(values)
    if series.start is not None:
        found.start.CopyFrom(timestamp(series.start, f"series {index}: start"))
    return found


def message(values: Sequence[float | None], identity: str = "") -> pb.Series:
    missing = [position for position, value in enumerate(values) if value is None]
    return pb.Series(values=[0.0 if value is None else value for value in values], missing=missing, id=identity)


def parsed(text: str, where: str) -> datetime:
    """Raises InvalidRequest."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(f"{where}: expected a time such as 2024-01-31T00:00:00Z, got {quoted(text, 40)}") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def timestamp(text: str, where: str) -> Timestamp:
    """Raises InvalidRequest."""
    seconds, rest = divmod(parsed(text, where) - _EPOCH, timedelta(seconds=1))
    return Timestamp(seconds=seconds, nanos=rest.microseconds * 1000)
