"""rafaga.v1.Forecasting: quantile forecasts of one or more series per request; any lengths share a batch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from google.protobuf.message import Message

from rafaga.bundle import Task
from rafaga.server.repository.repository import Repository
from rafaga.server.scheduling.job import Arrays, JobTiming
from rafaga.server.services.forecasting import checks, quantiles
from rafaga.server.services.forecasting.options import Options
from rafaga.server.services.forecasting.rollout import RollOut
from rafaga.server.services.forecasting.series import Floats, inputs, of_history, of_series
from rafaga.server.services.submission import RequestLimits, model_info, parse, submit, timing_message
from rafaga.server.transport.call import Call, Handler
from rafaga.v1 import forecasting_pb2 as pb


class Forecasting:
    def __init__(self, repository: Repository, limits: RequestLimits) -> None:
        self._repository = repository
        self._limits = limits

    def handlers(self) -> dict[str, Handler]:
        return {"/rafaga.v1.Forecasting/Forecast": self.forecast}

    def forecast(self, call: Call) -> None:
        request = parse(pb.ForecastRequest, call)
        model = self._repository.model(request.model, request.version, Task.FORECASTING)
        spec = model.bundle.forecast
        assert spec is not None  # Bundle checks it for this task
        options = Options.of(request, spec)
        if request.series:
            self._limits.check_rows(len(request.series) * (1 + options.check_last))
            series = [of_series(each, i, options) for i, each in enumerate(request.series)]
        else:
            series = [of_history(request.history, options)]
        positions = [checks.positions(each, options.check_last) for each in series]
        rows = [each.row(len(each.values)) for each in series]
        rows += [each.row(at) for each, checked in zip(series, positions, strict=True) for at in checked]

        def reply(outputs: Arrays, timing: JobTiming) -> Message | None:
            forecast, of_checks = np.split(outputs[0].astype(np.float32, copy=False), [len(series)])
            steps = iter(of_checks[:, 0])

            def finish(forecast: Floats, timing: JobTiming) -> pb.ForecastResponse:
                response = pb.ForecastResponse(model=model_info(model), timing=timing_message(timing))
                answers = [_quantiles(row[: options.horizon], options) for row in forecast]
                if request.series:
                    response.forecasts.extend(
                        pb.SeriesForecast(
                            quantiles=answer,
                            id=given.id,
                            timestamps=each.times_after(options.horizon),
                            filled=each.filled,
                            checks=[checks.check(each, at, next(steps)) for at in checked],
                        )
                        for given, each, checked, answer in zip(request.series, series, positions, answers, strict=True)
                    )
                else:
                    response.quantiles.extend(answers[0])
                return response

            if options.blocks == 1:
                return finish(forecast, timing)
            return RollOut(call, model, series, options.blocks, finish).proceed((forecast,), timing)

        submit(call, model, inputs(rows), reply)


def _quantiles(forecast: Floats, options: Options) -> list[pb.QuantileForecast]:
    """Of [horizon, L]."""
    levels: Iterable[float] = options.spec.quantile_levels
    if options.levels is not None:
        forecast = quantiles.at(options.levels, forecast, quantiles.stored(options.spec))
        levels = options.levels.tolist()
    columns = zip(levels, forecast.T.tolist(), strict=True)
    return [pb.QuantileForecast(level=level, values=values) for level, values in columns]
