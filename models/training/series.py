"""Trains forecasters on random windows of the parts of their series that evaluation does not use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import msgspec
import numpy as np
import torch
from torch import Tensor

from models.forecasting import Forecaster
from models.progress import SILENT, Steps
from models.training.calibration import IntervalCalibration, calibrated, transfer_errors
from models.training.data import Series
from models.training.forecast_eval import (
    Inputs,
    Origins,
    baselines,
    comparisons,
    evaluate,
    held_out,
    joined,
    metrics_of,
    overlap,
    quantiles_of,
    rolling_origins,
    usable_origins,
)
from models.training.loop import Batch, Problem
from rafaga.bundle import ForecastSpec, Metric
from rafaga.evaluation import Comparison, Share, coverage_name, intervals, shares, standard_error, training_size
from rafaga.series import interpolated

_SPANS = 4  # the training part is four fifths of a series, the test span one
_SPAN_ORIGINS = 300  # about as many as `held_out` measures


@dataclass(frozen=True)
class Windows:
    """How histories are drawn.

    `jitter`: noise added to them, in units of the mean change from season to season. `folds`: blocks of the
    calibration; many if data are few, so that a network trained without one of them is almost as good as the final one.
    `full`: share of histories that are as long as possible; the others are of any length.
    """

    batch_size: int
    batches_per_epoch: int
    jitter: float
    folds: int
    full: float = 0.0


class ForecastingProblem(Problem):
    """Quantile regression: the pinball loss of every level at every step of the horizon, in units of each series, whose
    missing values are NaN.

    `kept`: for each series, the observations that training must not forecast: to validate or to calibrate with.
    `covariates`: [T, C] for each series; empty without any.
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
        covariates: Sequence[Series] = (),
    ) -> None:
        self.module: Forecaster = module
        self.spec = spec
        self.series = series
        self.name = name
        self.drawn = drawn
        self.kept = kept or [range(0)] * len(series)
        self.covariates = covariates or [np.zeros((len(one), 0), np.float32) for one in series]
        self.batches_per_epoch = drawn.batches_per_epoch
        self.seen = [one[: training_size(one)] for one in series]
        self.intervals = tuple(intervals(spec.quantile_levels))
        levels = spec.quantile_levels
        self.nominal = {coverage_name(levels, *pair): levels[pair[1]] - levels[pair[0]] for pair in self.intervals}
        self.levels = torch.tensor(levels)
        self.comparisons: tuple[Comparison, ...] = ()
        self.coverage: tuple[tuple[Share, float], ...] = ()

        # All series end to end; `start`, `total`, `ends`, `unit` and `kept_*` have one value for each.
        self.values = torch.from_numpy(np.concatenate([interpolated(one) for one in self.seen]))
        self.observed = torch.from_numpy(np.isfinite(np.concatenate(self.seen)))
        self.beside = torch.from_numpy(
            np.concatenate([one[: len(seen)] for one, seen in zip(self.covariates, self.seen, strict=True)])
        )  # [T, C]
        if module.config.covariates:
            deviation = self.beside.std(0)
            module.covariate_mean.copy_(self.beside.mean(0))
            module.covariate_deviation.copy_(torch.where(deviation > 0, deviation, 1.0))
        self.total = torch.tensor([len(one) for one in self.seen])
        self.start = self.total.cumsum(0) - self.total
        self.ends = (self.total - spec.min_history).cumsum(
            0
        )  # how many histories may be drawn from it and those before
        self.unit = torch.stack([(one[spec.season :] - one[: -spec.season]).abs().mean() for one in self._parts()])
        self.kept_start, self.kept_stop = torch.tensor([[block.start, block.stop] for block in self.kept]).T
        if module.config.linear:
            module.fit_linear(*self._seen())

    def _parts(self) -> Sequence[Tensor]:
        return torch.split(self.values, self.total.tolist())

    def rehearsals(self) -> Sequence[ForecastingProblem]:
        """New modules, each trained without one block of this one's training data."""
        parts = (self.spec, self.series, self.name, self.drawn)
        blocks = self._blocks(self.drawn.folds)
        return [ForecastingProblem(Forecaster(self.module.config), *parts, kept, self.covariates) for kept in blocks]

    def _blocks(self, count: int) -> Iterator[Sequence[range]]:
        """Equal blocks of the training parts, in the order of time: one of every series each."""
        edges = [np.linspace(self.spec.min_history, len(one), count + 1).astype(int).tolist() for one in self.seen]
        return zip(*([range(*pair) for pair in pairwise(of_one)] for of_one in edges), strict=True)

    def batches(self) -> Iterator[Batch]:
        for _ in range(self.batches_per_epoch):
            yield self.windows()

    def windows(self) -> Batch:
        """future [N, H], known [N, H]: the observed part of the future that training may use, unit [N], and the inputs:
        history [N, T], length [N], and with C covariates these, [N, T, C] and [N, H, C]."""
        spec, n = self.spec, self.drawn.batch_size
        drawn = torch.randint(int(self.ends[-1]), (n,))
        series = torch.searchsorted(self.ends, drawn, right=True)
        start, total = self.start[series], self.total[series]
        end = drawn - (self.ends[series] - total)  # min_history .. total - 1
        longest = end.clamp(max=spec.max_history)
        length = spec.min_history + (torch.rand(n) * (longest - spec.min_history + 1)).long()
        if self.drawn.full:
            length = torch.where(torch.rand(n) < self.drawn.full, longest, length)
        step = torch.arange(int(length.max()))
        inside = step < length[:, None]
        unit = self.unit[series]
        past = (start + end - length)[:, None] + step * inside
        history = self.values[past]
        history = (history + self.drawn.jitter * unit[:, None] * torch.randn(history.shape)) * inside
        ahead = end[:, None] + torch.arange(spec.max_horizon)
        before, after = ahead < self.kept_start[series][:, None], ahead >= self.kept_stop[series][:, None]
        known = (ahead < total[:, None]) & (before | after)
        later = start[:, None] + torch.minimum(ahead, total[:, None] - 1)
        covariates = (self.beside[past], self.beside[later]) if self.module.config.covariates else ()
        # What fills a gap at the end of a history is interpolated with values after it.
        known &= self.observed[later] & self.observed[start + end - 1][:, None]
        return self.values[later], known, unit, history, length, *covariates

    def loss(self, batch: Batch) -> Tensor:
        future, known, unit, *inputs = batch
        error = (future[:, :, None] - self.module(*inputs)) / unit[:, None, None]  # [N, H, Q]
        levels = self.levels.to(error.device)
        pinball = torch.maximum(levels * error, (levels - 1) * error).mean(2)
        return (pinball * known).sum() / known.sum()

    def validation(self) -> Iterator[Batch]:
        """The horizons inside the blocks `kept`, without jitter."""
        parts = self._origins_in(self.kept)
        unit = torch.repeat_interleave(self.unit, torch.tensor([len(part.length) for part in parts]))
        origins = joined(parts)
        future = torch.from_numpy(origins.future)
        known = torch.ones_like(future, dtype=torch.bool)
        yield future, known, unit, *map(torch.from_numpy, origins.inputs.values())

    def _seen(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """history, length, future and unit of every second origin whose horizon training may use."""
        parts, units = [], []
        for number, (one, kept) in enumerate(zip(self.seen, self.kept, strict=True)):
            for start, stop in ((0, kept.start), (kept.stop, len(one))):
                if usable_origins(one, self.spec, start, stop):
                    parts.append(rolling_origins(one, self.spec, start, stop, stride=2))
                    units.append(self.unit[number].expand(len(parts[-1].length)))
        origins = joined(parts)
        history, length, future = (torch.from_numpy(x) for x in (origins.history, origins.length, origins.future))
        return history, length, future, torch.cat(units)

    def _origins_in(self, blocks: Sequence[range], stride: int = 1) -> Sequence[Origins]:
        """Whose horizons are inside the block of their series."""
        found = zip(self.seen, blocks, self.covariates, strict=True)
        return [rolling_origins(one, self.spec, b.start, b.stop, stride, known) for one, b, known in found]

    def calibrate(self, rehearsals: Sequence[Problem], steps: Steps = SILENT) -> IntervalCalibration:
        """Sets the spread that `rehearsals` would have needed on the blocks they were not trained on.

        A network is overconfident on its training data.
        """
        steps.step("comparing with the held-out blocks")
        blocks = []
        for number, rehearsal in enumerate(rehearsals, start=1):
            assert isinstance(rehearsal, ForecastingProblem)  # its own
            blocks.append(rehearsal.outside(rehearsal.kept))
            steps.advance(number, len(rehearsals))
        found = calibrated(blocks, self.nominal)
        self.module.spread.fill_(found.spread)
        return msgspec.structs.replace(found, transfer=self.transfer())

    def transfer(self) -> Mapping[str, float]:
        """The transfer errors of the module on spans of its training part that are as long as the test span."""
        stride = max(1, sum(map(len, self.seen)) // (_SPANS * _SPAN_ORIGINS))
        return transfer_errors([self.outside(span, stride) for span in self._blocks(_SPANS)], self.nominal)

    def outside(self, blocks: Sequence[range], stride: int = 1) -> Series:
        """Distance of the observations in `blocks` from the median, 1 at the edge of the interval. [M, intervals]"""
        origins = joined(self._origins_in(blocks, stride))
        quantiles = quantiles_of(self.forecast, origins)
        median = quantiles[:, :, self.module.median]
        error = origins.future - median
        columns = []
        for low, high in self.intervals:
            edge = np.where(error > 0, quantiles[:, :, high], quantiles[:, :, low]) - median
            columns.append((error / edge).ravel())
        return np.stack(columns, axis=1)

    def evaluate(self, steps: Steps = SILENT) -> tuple[Metric, ...]:
        origins = held_out(self.series, self.spec, self.covariates)
        dataset = f"{self.name}, last fifth"
        steps.step("forecasting the last fifth")
        quantiles = quantiles_of(self.forecast, origins)
        others = baselines(origins, self.spec, steps)
        self.comparisons = tuple(comparisons(origins, self.spec, quantiles, others))
        held = islice(shares(origins.future, quantiles, self.spec.quantile_levels), len(self.intervals))
        self.coverage = tuple(
            (share, standard_error(share.held.mean(1), overlap(origins), origins.series)) for share in held
        )
        measured = metrics_of({baseline.metric: each for baseline, each in others.items()}, dataset, origins)
        return evaluate(origins, self.spec, quantiles, dataset) + measured

    def forecast(self, inputs: Inputs) -> Series:
        with torch.inference_mode():
            quantiles: Series = self.module(*map(torch.from_numpy, inputs.values())).numpy()
        return quantiles
