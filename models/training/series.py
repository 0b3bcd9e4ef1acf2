"""Forecasters, trained on windows cut at random from the part of a series that evaluation does not use."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from rafaga.bundle import Metric
from torch import Tensor

from models.entry import SeriesInput
from models.forecasting import Forecaster
from models.training.data import Series
from models.training.forecast_eval import baselines, evaluate, held_out, training_size
from models.training.loop import Batch, Problem


class Forecasting(Problem):
    """Quantile regression: the pinball loss of every level at every step of the horizon, in units of the series."""

    def __init__(
        self, module: Forecaster, spec: SeriesInput, series: Series, name: str, batch_size: int, batches_per_epoch: int
    ) -> None:
        self.module: Forecaster = module
        self.spec = spec
        self.series = series
        self.name = name
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.seen = torch.from_numpy(series[: training_size(series)].copy())
        self.levels = torch.tensor(spec.quantile_levels)
        self.unit = (self.seen[spec.season :] - self.seen[: -spec.season]).abs().mean()

    def batches(self) -> Iterator[Batch]:
        for _ in range(self.batches_per_epoch):
            yield self.windows()

    def windows(self) -> Batch:
        """history [N, T], length [N], future [N, H], known [N, H]: which of the future still belongs to training."""
        spec, n = self.spec, self.batch_size
        total = len(self.seen)
        end = torch.randint(spec.min_history, total, (n,))
        longest = end.clamp(max=spec.max_history)
        length = spec.min_history + (torch.rand(n) * (longest - spec.min_history + 1)).long()
        step = torch.arange(int(length.max()))
        inside = step < length[:, None]
        history = self.seen[(end - length)[:, None] + step * inside] * inside
        ahead = end[:, None] + torch.arange(spec.max_horizon)
        known = ahead < total
        return history, length, self.seen[ahead.clamp(max=total - 1)], known

    def loss(self, batch: Batch) -> Tensor:
        history, length, future, known = batch
        error = (future[:, :, None] - self.module(history, length)) / self.unit  # [N, H, Q]
        pinball = torch.maximum(self.levels * error, (self.levels - 1) * error).mean(2)
        return (pinball * known).sum() / known.sum()

    def evaluate(self) -> tuple[Metric, ...]:
        origins = held_out(self.series, self.spec)
        dataset = f"{self.name}, last fifth"
        return evaluate(origins, self.spec, self.forecast, dataset) + baselines(origins, self.spec, dataset)

    def forecast(self, history: Series, length: npt.NDArray[np.int64]) -> Series:
        with torch.inference_mode():
            quantiles: Series = self.module(torch.from_numpy(history), torch.from_numpy(length)).numpy()
        return quantiles
