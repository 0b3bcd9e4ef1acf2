"""Forecasts beyond the model's horizon: each block continues the series with its median, and the next one follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from google.protobuf.message import Message

from rafaga.errors import RafagaError
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.scheduling.job import Arrays, JobTiming
from rafaga.server.services.forecasting import quantiles
from rafaga.server.services.forecasting.series import Floats, Observations, inputs
from rafaga.server.services.submission import submit
from rafaga.server.transport.router import Call


class RollOut:
    """The forecasts of one request, a job per block.

    finish: makes the reply of all blocks, float32 [N, blocks * max_horizon, L], and of their timings together.
    """

    def __init__(
        self,
        call: Call,
        model: ServedModel,
        series: Sequence[Observations],
        blocks: int,
        finish: Callable[[Floats, JobTiming], Message],
    ) -> None:
        self._call, self._model, self._series, self._left, self._finish = call, model, series, blocks, finish
        self._levels = quantiles.stored(series[0].spec)
        self._blocks: list[Floats] = []
        self._medians: list[Floats] = []  # [N, max_horizon] each
        self._distances = np.zeros((len(series), len(self._levels)), np.float32)  # see `widened`
        self._timing = JobTiming(0.0, 0.0, 0)

    def proceed(self, outputs: Arrays, timing: JobTiming) -> Message | None:
        """Takes a block, [N, max_horizon, L]. None: the next one is queued, and the call is answered later."""
        block = outputs[0].astype(np.float32, copy=False)
        self._medians.append(quantiles.median(block, self._levels)[..., 0])
        wide, self._distances = quantiles.widened(block, self._distances, self._levels)
        self._blocks.append(wide if self._blocks else block)
        self._left -= 1
        queue_s, inference_s, batch_size = self._timing
        self._timing = JobTiming(
            queue_s + timing.queue_s, inference_s + timing.inference_s, max(batch_size, timing.batch_size)
        )
        if not self._left:
            return self._finish(np.concatenate(self._blocks, axis=1), self._timing)
        if self._call.finished:  # cancelled
            return None
        try:
            medians = np.concatenate(self._medians, axis=1)
            rows = [
                each.row(len(each.values) + len(median), median)
                for each, median in zip(self._series, medians, strict=True)
            ]
            # This thread may belong to an engine: only those that receive calls run models themselves.
            submit(self._call, self._model, inputs(rows), self.proceed, inline=False)
        except RafagaError as error:
            self._call.fail(error)
        return None
