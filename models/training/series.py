"""Trains forecasters on random windows of the parts of their series that evaluation does not use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.forecasting import Forecaster
from models.progress import SILENT, Steps
from models.training.data import Series
from models.training.forecast_eval import (
    Origins,
    comparisons,
    evaluate,
    held_out,
    joined,
    metrics_of,
    overlap,
    quantiles_of,
    rolling_origins,
    training_size,
)
from models.training.loop import Batch, Problem
from rafaga.bundle import ForecastSpec, Metric
from rafaga.evaluation import Comparison, Share, intervals, shares, standard_error


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
    """Quantile regression: the pinball loss of every level at every step of the horizon, in units of each series.

    `kept`: for each series, the observations that training must not forecast: to validate or to calibrate with.
    `evaluate` fills in `comparisons` with the baselines, and the `coverage` of intervals, each with its standard error.
    """

    def __init__(
        self,
        module: Forecaster,
        spec: ForecastSpec,
        series: Sequence[Series],
        name: str,
        drawn: Windows,
        kept: Sequence[range] = (),
    ) -> None:
        self.module: Forecaster = module
        self.spec = spec
        self.series = series
        self.name = name
        self.drawn = drawn
        self.kept = kept or [range(0)] * len(series)
        self.batches_per_epoch = drawn.batches_per_epoch
        self.seen = [one[: training_size(one)] for one in series]
        self.intervals = tuple(intervals(spec.quantile_levels))
        self.levels = torch.tensor(spec.quantile_levels)
        self.comparisons: tuple[Comparison, ...] = ()
        self.coverage: tuple[tuple[Share, float], ...] = ()

        # All series end to end; `start`, `total`, `ends`, `unit` and `kept_*` have one value for each.
        self.values = torch.from_numpy(np.concatenate(self.seen))
        self.total = torch.tensor([len(one) for one in self.seen])
        self.start = self.total.cumsum(0) - self.total
        self.ends = (self.total - spec.min_history).cumsum(
            0
        )  # how many histories may be drawn from it and those before
        self.unit = torch.stack([(one[spec.season :] - one[: -spec.season]).abs().mean() for one in self._parts()])
        self.kept_start, self.kept_stop = torch.tensor([[block.start, block.stop] for block in self.kept]).T

    def _parts(self) -> Sequence[Tensor]:
        return torch.split(self.values, self.total.tolist())

    def rehearsals(self) -> Sequence[ForecastingProblem]:
        """New modules, each trained without one block of this one's training data."""
        folds = self.drawn.folds
        edges = [np.linspace(self.spec.min_history, len(one), folds + 1).astype(int).tolist() for one in self.seen]
        blocks = zip(*([range(*pair) for pair in pairwise(of_one)] for of_one in edges), strict=True)
        return [
            ForecastingProblem(Forecaster(self.module.config), self.spec, self.series, self.name, self.drawn, kept)
            for kept in blocks
        ]

    def batches(self) -> Iterator[Batch]:
        for _ in range(self.batches_per_epoch):
            yield self.windows()

    def windows(self) -> Batch:
        """history [N, T], length [N], future [N, H], known [N, H]: the part of the future that training may use,
        unit [N]."""
        spec, n = self.spec, self.drawn.batch_size
        drawn = torch.randint(int(self.ends[-1]), (n,))
        series = torch.searchsorted(self.ends, drawn, right=True)
        start, total = self.start[series], self.total[series]
        end = drawn - (self.ends[series] - total)  # min_history .. total - 1
        longest = end.clamp(max=spec.max_history)
        length = spec.min_history + (torch.rand(n) * (longest - spec.min_history + 1)).long()
        step = torch.arange(int(length.max()))
        inside = step < length[:, None]
        unit = self.unit[series]
        history = self.values[(start + end - length)[:, None] + step * inside]
        history = (history + self.drawn.jitter * unit[:, None] * torch.randn(history.shape)) * inside
        ahead = end[:, None] + torch.arange(spec.max_horizon)
        before, after = ahead < self.kept_start[series][:, None], ahead >= self.kept_stop[series][:, None]
        known = (ahead < total[:, None]) & (before | after)
        future = self.values[start[:, None] + torch.minimum(ahead, total[:, None] - 1)]
        return history, length, future, known, unit

    def loss(self, batch: Batch) -> Tensor:
        history, length, future, known, unit = batch
        error = (future[:, :, None] - self.module(history, length)) / unit[:, None, None]  # [N, H, Q]
        levels = self.levels.to(error.device)
        pinball = torch.maximum(levels * error, (levels - 1) * error).mean(2)
        return (pinball * known).sum() / known.sum()

    def validation(self) -> Iterator[Batch]:
        """The horizons inside the blocks `kept`, without jitter."""
        parts = [self._kept_origins(number) for number in range(len(self.seen))]
        unit = torch.repeat_interleave(self.unit, torch.tensor([len(part.length) for part in parts]))
        origins = joined(parts)
        future = torch.from_numpy(origins.future)
        known = torch.ones_like(future, dtype=torch.bool)
        yield torch.from_numpy(origins.history), torch.from_numpy(origins.length), future, known, unit

    def _kept_origins(self, number: int, stride: int = 1) -> Origins:
        kept = self.kept[number]
        return rolling_origins(self.seen[number], self.spec, kept.start, kept.stop, stride)

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
        origins = joined([self._kept_origins(number) for number in range(len(self.seen))])
        quantiles = quantiles_of(self.forecast, origins)
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
        quantiles = quantiles_of(self.forecast, origins)
        self.comparisons = tuple(comparisons(origins, self.spec, quantiles, steps))
        held = islice(shares(origins.future, quantiles, self.spec.quantile_levels), len(self.intervals))
        self.coverage = tuple((share, standard_error(share.held, overlap(origins))) for share in held)
        baselines = {compared.baseline.metric: compared.baseline_mase for compared in self.comparisons}
        return evaluate(origins, self.spec, quantiles, dataset) + metrics_of(baselines, dataset, origins)

    def forecast(self, history: Series, length: npt.NDArray[np.int64]) -> Series:
        with torch.inference_mode():
            quantiles: Series = self.module(torch.from_numpy(history), torch.from_numpy(length)).numpy()
        return quantiles
