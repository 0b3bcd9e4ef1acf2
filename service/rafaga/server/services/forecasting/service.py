"""rafaga.v1.Forecasting: quantile forecasts of one or more series per request; any lengths share a batch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from rafaga.bundle import Task
from rafaga.server.repository.repository import Repository
from rafaga.server.scheduling.job import Arrays, JobTiming
from rafaga.server.services.decoding import DecodePool
from rafaga.server.services.forecasting import checks, quantiles
from rafaga.server.services.forecasting.options import Options
from rafaga.server.services.forecasting.rollout import RollOut
from rafaga.server.services.forecasting.series import inputs, of_history, of_series
from rafaga.server.services.submission import RequestLimits, find, model_info, parse, submit, timing_message
from rafaga.server.transport.router import Call, Handler
from rafaga.v1 import forecasting_pb2 as pb

# Reading so much would block the thread on which calls arrive for some milliseconds: a pool's thread does.
_LARGE_BYTES = 64 * 1024


class Forecasting:
    def __init__(self, repository: Repository, decode_pool: DecodePool, limits: RequestLimits) -> None:
        self._repository = repository
        self._decode_pool = decode_pool
        self._limits = limits

    def handlers(self) -> dict[str, Handler]:
        return {"/rafaga.v1.Forecasting/Forecast": self.forecast}

    def forecast(self, call: Call) -> None:
        if len(call.request) < _LARGE_BYTES:
            self._answer(call)
        else:
            self._decode_pool.run(call, lambda: self._answer(call))

    def _answer(self, call: Call) -> None:
        request = parse(pb.ForecastRequest, call)
        model = find(self._repository, request.model, request.version, Task.FORECASTING)
        spec = model.bundle.forecast
        assert spec is not None  # Bundle checks it for this task
        options = Options.of(request, spec)
        if request.series:
            self._limits.check_rows(len(request.series) * (1 + options.check_last))
            series = [of_series(each, i, options) for i, each in enumerate(request.series)]
        else:
            series = [of_history(request.history, options)]
        rows = [each.row(len(each.values)) for each in series]
        checked = [checks.positions(each, options.check_last) for each in series] if options.check_last else ()
        rows += [series[i].row(at) for i, positions in enumerate(checked) for at in positions]

        def finish(forecast: NDArray[np.generic], of_checks: NDArray[np.generic], timing: JobTiming) -> Message:
            response = pb.ForecastResponse(model=model_info(model), timing=timing_message(timing))
            if not request.series:
                response.quantiles.extend(_quantiles(forecast[0, : options.horizon], options))
                return response
            steps = iter(of_checks)
            for i, (given, each) in enumerate(zip(request.series, series, strict=True)):
                response.forecasts.add(
                    quantiles=_quantiles(forecast[i, : options.horizon], options),
                    id=given.id,
                    timestamps=each.times_after(options.horizon),
                    filled=each.filled,
                    checks=[checks.check(each, at, next(steps)) for at in checked[i]] if checked else (),
                )
            return response

        def reply(outputs: Arrays, timing: JobTiming) -> Message | None:
            forecast, count = outputs[0], len(series)
            of_checks = forecast[count:, 0]
            if options.blocks == 1:
                return finish(forecast, of_checks, timing)
            roll_out = RollOut(
                call, model, series, options.blocks, lambda blocks, timing: finish(blocks, of_checks, timing)
            )
            return roll_out.proceed((forecast[:count],), timing)

        submit(call, model, inputs(rows), reply)


def _quantiles(forecast: NDArray[np.generic], options: Options) -> list[pb.QuantileForecast]:
    """Of [horizon, L]."""
    levels: Iterable[float] = options.spec.quantile_levels
    if options.levels is not None:
        forecast = quantiles.at(options.levels, forecast.astype(np.float32), quantiles.stored(options.spec))
        levels = options.levels.tolist()
    columns = zip(levels, forecast.T.tolist(), strict=True)
    return [pb.QuantileForecast(level=level, values=values) for level, values in columns]
