"""/v1/timeseries/forecast: forecasts as KServe's clients ask for them.

https://github.com/kserve/kserve/blob/master/python/kserve/kserve/protocol/rest/timeseries/types.py
"""

from __future__ import annotations

import time
import uuid
from calendar import monthrange
from datetime import datetime
from functools import partial
from http import HTTPStatus
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rafaga.calendar import MONTHS, WEEKDAYS
from rafaga.errors import InvalidRequest, listed
from rafaga.server.services.rest.conversion import decoded, shortest
from rafaga.server.services.rest.forecast import Time, Values, message, parsed, timestamp
from rafaga.server.transport.http_calls import HttpCalls, json_response
from rafaga.v1 import forecasting_pb2 as pb

PATH = "/v1/timeseries/forecast"

_MEDIAN = 0.5

_Frequency = Literal[
    "second", "S", "minute", "T", "hour", "H", "day", "D", "week", "W", "month", "M", "quarter", "Q", "year", "Y"
]
_UNITS = {
    name: unit
    for *names, unit in (
        *(("second", "S", "s"), ("minute", "T", "min"), ("hour", "H", "h"), ("day", "D", "D")),
        *(("week", "W", "W"), ("month", "M", "M"), ("quarter", "Q", "Q"), ("year", "Y", "Y")),
    )
    for name in names
}


class TimeSeriesInput(Struct):
    type: Literal["univariate_time_series"]
    name: str
    series: Values
    frequency: _Frequency
    start_timestamp: Time | None = None


class TimeSeriesOptions(Struct):
    horizon: Annotated[int, Meta(ge=1, le=2**32 - 1)]
    quantiles: list[float] | None = None


class TimeSeriesRequest(Struct):
    model: str
    inputs: Annotated[list[TimeSeriesInput], Meta(min_length=1)]
    options: TimeSeriesOptions


class TimeSeriesForecast(Struct):
    type: str
    name: str
    mean_forecast: Annotated[list[float], Meta(description="the median")]
    frequency: str
    start_timestamp: str
    quantiles: dict[str, list[float]] | None


class TimeSeriesOutput(Struct):
    type: str
    id: str
    status: str
    content: list[TimeSeriesForecast]
    error: None = None


class TimeSeriesResponse(Struct):
    id: str
    created_at: int
    status: str
    model: str
    outputs: list[TimeSeriesOutput]
    error: None = None
    usage: None = None


def routes(calls: HttpCalls) -> list[Route]:
    return [Route(PATH, partial(_forecast, calls), methods=["POST"])]


async def _forecast(calls: HttpCalls, request: Request) -> Response:
    forecast = _Forecast()
    method = "/rafaga.v1.Forecasting/Forecast"
    response = await calls.serve(request, method, forecast.translate, forecast.render)
    if response.status_code < 400 or not response.body:
        return response
    message = msgspec.json.decode(response.body)["error"]
    code = response.status_code
    error = {"code": str(code), "message": message, "param": None, "type": HTTPStatus(code).phrase}
    kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
    return json_response({"error": error}, code, kept)


class _Forecast:
    """One request: what it says about its series is needed when the reply is there."""

    _given: TimeSeriesRequest

    def translate(self, body: bytes) -> pb.ForecastRequest:
        """Raises InvalidRequest."""
        given = self._given = decoded(body, TimeSeriesRequest)
        series, aliases = [], set()
        for i, each in enumerate(given.inputs):
            found = message(each.series, each.name)
            start = None
            if each.start_timestamp is not None:
                where = f"series {i}: start_timestamp"
                start = parsed(each.start_timestamp, where)
                found.start.CopyFrom(timestamp(each.start_timestamp, where))
            aliases.add(_alias(each.frequency, start))
            series.append(found)
        if len(aliases) > 1:
            raise InvalidRequest(
                f"expected series of one frequency, got {listed(sorted(aliases))}: send a request for each"
            )
        return pb.ForecastRequest(
            model=given.model,
            series=series,
            horizon=given.options.horizon,
            frequency=aliases.pop(),
            quantiles=self._levels,
        )

    def render(self, payload: bytes) -> Response:
        reply = pb.ForecastResponse.FromString(payload)
        given, identity = self._given, str(uuid.uuid4())
        outputs = [
            TimeSeriesOutput("time_series_forecast", f"{identity}-{i}", "completed", [self._content(one, forecast)])
            for i, (one, forecast) in enumerate(zip(given.inputs, reply.forecasts, strict=True))
        ]
        return json_response(TimeSeriesResponse(identity, int(time.time()), "completed", given.model, outputs))

    def _content(self, series: TimeSeriesInput, forecast: pb.SeriesForecast) -> TimeSeriesForecast:
        wanted = self._given.options.quantiles
        values = {level: shortest(each.values) for level, each in zip(self._levels, forecast.quantiles, strict=True)}
        return TimeSeriesForecast(
            type=series.type,
            name=series.name,
            mean_forecast=values[_MEDIAN],
            frequency=series.frequency,
            start_timestamp=forecast.timestamps[0].ToJsonString() if forecast.timestamps else "",
            quantiles=None if wanted is None else {str(level): values[level] for level in wanted},
        )

    @property
    def _levels(self) -> list[float]:
        return sorted({_MEDIAN, *(self._given.options.quantiles or ())})


def _alias(frequency: str, start: datetime | None) -> str:
    """pandas' name. KServe's say no day on which weeks, months, quarters and years begin: it is that of `start`."""
    unit = _UNITS[frequency]
    if unit == "W":
        return f"W-{WEEKDAYS[start.weekday()]}" if start else unit
    if unit not in ("M", "Q", "Y"):
        return unit
    at_end = start is not None and start.day == monthrange(start.year, start.month)[1]
    month = f"-{MONTHS[start.month - 1]}" if start and unit != "M" else ""
    return f"{unit}{'E' if at_end else 'S'}{month}"
