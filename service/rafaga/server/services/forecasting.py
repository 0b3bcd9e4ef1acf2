"""rafaga.v1.Forecasting: quantile forecasts of one series per request; series of any length share a batch."""

from __future__ import annotations

import numpy as np

from rafaga.bundle import ForecastSpec, Task
from rafaga.errors import InvalidRequest, InvalidTensor
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.repository.repository import Repository
from rafaga.server.scheduling.job import Arrays, JobTiming
from rafaga.server.services.submission import model_info, parse, submit, timing_message
from rafaga.server.transport.call import Call, Handler
from rafaga.v1 import forecasting_pb2 as pb


class Forecasting:
    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def handlers(self) -> dict[str, Handler]:
        return {"/rafaga.v1.Forecasting/Forecast": self.forecast}

    def forecast(self, call: Call) -> None:
        request = parse(pb.ForecastRequest, call)
        model = self._repository.model(request.model, request.version, Task.FORECASTING)
        spec = model.bundle.forecast
        assert spec is not None  # Bundle checks it for this task
        if request.horizon > spec.max_horizon:
            raise InvalidRequest(f"expected a horizon of at most {spec.max_horizon} steps, got {request.horizon}")
        horizon = request.horizon or spec.max_horizon
        history = np.array(request.history, dtype=np.float32)
        if len(history) < spec.min_history:
            raise InvalidTensor(f"expected at least {spec.min_history} observations, got {len(history)}")
        if not np.isfinite(history).all():
            raise InvalidTensor("expected finite numbers in the history: fill the gaps first")
        # The model looks no further back than max_history.
        history = history[-spec.max_history :]
        inputs = (history[np.newaxis], np.array([len(history)], dtype=np.int64))
        submit(call, model, inputs, lambda out, timing: _reply(model, spec, out, timing, horizon))


def _reply(
    model: ServedModel, spec: ForecastSpec, outputs: Arrays, timing: JobTiming, horizon: int
) -> pb.ForecastResponse:
    response = pb.ForecastResponse(model=model_info(model), timing=timing_message(timing))
    by_level = outputs[0][0, :horizon].T  # [levels, horizon]
    for level, values in zip(spec.quantile_levels, by_level.tolist(), strict=True):
        response.quantiles.add(level=level, values=values)
    return response
