"""rafaga.v1.Forecasting: quantile forecasts of one or more series per request; any lengths share a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rafaga.bundle import ForecastSpec, Task
from rafaga.errors import InvalidRequest, InvalidTensor
from rafaga.server.repository.repository import Repository
from rafaga.server.scheduling.job import Arrays, JobTiming
from rafaga.server.services.submission import RequestLimits, find, model_info, padded, parse, submit, timing_message
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
        model = find(self._repository, request.model, request.version, Task.FORECASTING)
        spec = model.bundle.forecast
        assert spec is not None  # Bundle checks it for this task
        if request.horizon > spec.max_horizon:
            raise InvalidRequest(f"expected a horizon of at most {spec.max_horizon} steps, got {request.horizon}")
        if request.history and request.series:
            raise InvalidRequest("expected either `history` or `series`, got both")
        horizon = request.horizon or spec.max_horizon
        if request.series:
            self._limits.check_rows(len(request.series))
        histories = [_history(s.values, spec, f"series {i}: ") for i, s in enumerate(request.series)]
        inputs = padded(histories or [_history(request.history, spec)])

        def reply(outputs: Arrays, timing: JobTiming) -> pb.ForecastResponse:
            response = pb.ForecastResponse(model=model_info(model), timing=timing_message(timing))
            forecasts = [_quantiles(row[:horizon], spec) for row in outputs[0]]
            if histories:
                response.forecasts.extend(pb.SeriesForecast(quantiles=quantiles) for quantiles in forecasts)
            else:
                response.quantiles.extend(forecasts[0])
            return response

        submit(call, model, inputs, reply)


def _history(values: Sequence[float], spec: ForecastSpec, where: str = "") -> NDArray[np.float32]:
    """float32 [T]. Raises InvalidTensor, whose message begins with `where`."""
    history = np.array(values, dtype=np.float32)
    if len(history) < spec.min_history:
        raise InvalidTensor(f"{where}expected at least {spec.min_history} observations, got {len(history)}")
    if not np.isfinite(history).all():
        raise InvalidTensor(f"{where}expected finite numbers in the history: fill the gaps first")
    # The model looks no further back than max_history.
    return history[-spec.max_history :]


def _quantiles(forecast: NDArray[np.generic], spec: ForecastSpec) -> list[pb.QuantileForecast]:
    """Of [horizon, levels]."""
    levels = zip(spec.quantile_levels, forecast.T.tolist(), strict=True)
    return [pb.QuantileForecast(level=level, values=values) for level, values in levels]
