"""Trains forecasters on random windows of the part of a series that evaluation does not use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.forecasting import Forecaster
from models.progress import SILENT, Steps
from models.training.data import Series
from models.training.forecast_eval import baselines, evaluate, held_out, intervals, rolling_origins, training_size
from models.training.loop import Batch, Problem
from rafaga.bundle import ForecastSpec, Metric


@dataclass(frozen=True)
class Windows:
    """How histories are drawn.

    `jitter`: noise added to them, in units of the mean change from season to season. `folds`: blocks of the
    calibration; many if data are few, so that a network trained without one of them is almost as good as the final one.
    """

    batch_size: int
    batches_per_epoch: int
    jitter: float
    folds: int


class ForecastingProblem(Problem):
    """Quantile regression: the pinball loss of every level at every step of the horizon, in units of the series."""

    def __init__(
        self,
        module: Forecaster,
        spec: ForecastSpec,
        series: Series,
        name: str,
        drawn: Windows,
        kept_from: range = range(0),
    ) -> None:
        self.module: Forecaster = module
        self.spec = spec
        self.series = series
        self.name = name
        self.drawn = drawn
        self.kept_from = kept_from  # observations that training must not forecast
        self.batches_per_epoch = drawn.batches_per_epoch
        self.seen = torch.from_numpy(series[: training_size(series)].copy())
        self.intervals = tuple(intervals(spec.quantile_levels))
        self.levels = torch.tensor(spec.quantile_levels)
        self.unit = (self.seen[spec.season :] - self.seen[: -spec.season]).abs().mean()

    def rehearsals(self) -> Sequence[ForecastingProblem]:
        """New modules, each trained without one block of this one's training data."""
        edges = np.linspace(self.spec.min_history, len(self.seen), self.drawn.folds + 1).astype(int)
        return [
            ForecastingProblem(
                Forecaster(self.module.config), self.spec, self.series, self.name, self.drawn, range(start, stop)
            )
            for start, stop in pairwise(edges.tolist())
        ]

    def batches(self) -> Iterator[Batch]:
        for _ in range(self.batches_per_epoch):
            yield self.windows()

    def windows(self) -> Batch:
        """history [N, T], length [N], future [N, H], known [N, H]: the part of the future that training may use."""
        spec, n = self.spec, self.drawn.batch_size
        total = len(self.seen)
        end = torch.randint(spec.min_history, total, (n,))
        longest = end.clamp(max=spec.max_history)
        length = spec.min_history + (torch.rand(n) * (longest - spec.min_history + 1)).long()
        step = torch.arange(int(length.max()))
        inside = step < length[:, None]
        history = self.seen[(end - length)[:, None] + step * inside]
        history = (history + self.drawn.jitter * self.unit * torch.randn(history.shape)) * inside
        ahead = end[:, None] + torch.arange(spec.max_horizon)
        known = (ahead < total) & ((ahead < self.kept_from.start) | (ahead >= self.kept_from.stop))
        return history, length, self.seen[ahead.clamp(max=total - 1)], known

    def loss(self, batch: Batch) -> Tensor:
        history, length, future, known = batch
        error = (future[:, :, None] - self.module(history, length)) / self.unit  # [N, H, Q]
        levels = self.levels.to(error.device)
        pinball = torch.maximum(levels * error, (levels - 1) * error).mean(2)
        return (pinball * known).sum() / known.sum()

    def calibrate(self, rehearsals: Sequence[Problem], steps: Steps = SILENT) -> None:
        """Sets the spread that `rehearsals` would have needed on the blocks they were not trained on.

        A network is overconfident on its training data. For each interval, the factor that gives the nominal coverage
        is a quantile of the distances of observations from the median, in widths of the forecast (cross-conformal
        prediction, Vovk 2015, with the score of Romano et al. 2019). Their mean is used, so that quantiles never cross.
        """
        steps.step("comparing with the held-out blocks")
        blocks = []
        for number, rehearsal in enumerate(rehearsals, start=1):
            assert isinstance(rehearsal, ForecastingProblem)  # its own
            blocks.append(rehearsal.outside())
            steps.advance(number, len(rehearsals))
        outside = np.concatenate(blocks)  # [M, intervals]
        shares = [self.spec.quantile_levels[high] - self.spec.quantile_levels[low] for low, high in self.intervals]
        factors = [np.quantile(outside[:, i], share) for i, share in enumerate(shares)]
        self.module.spread.fill_(float(np.mean(factors)))

    def outside(self) -> Series:
        """Distance of its held-out observations from the median, 1 at the edge of the interval. [M, intervals]"""
        origins = rolling_origins(self.seen.numpy(), self.spec, self.kept_from.start, self.kept_from.stop)
        quantiles = self.forecast(origins.history, origins.length)
        median = quantiles[:, :, self.module.median]
        error = origins.future - median
        columns = []
        for low, high in self.intervals:
            edge = np.where(error > 0, quantiles[:, :, high], quantiles[:, :, low]) - median
            columns.append((error / edge).ravel())
        return np.stack(columns, axis=1)

    def evaluate(self, steps: Steps = SILENT) -> tuple[Metric, ...]:
        origins = held_out(self.series, self.spec)
        dataset = f"{self.name}, last fifth"
        steps.step("forecasting the last fifth")
        figures = evaluate(origins, self.spec, self.forecast, dataset)
        return figures + baselines(origins, self.spec, dataset, steps)

    def forecast(self, history: Series, length: npt.NDArray[np.int64]) -> Series:
        with torch.inference_mode():
            quantiles: Series = self.module(torch.from_numpy(history), torch.from_numpy(length)).numpy()
        return quantiles
