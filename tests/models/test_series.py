"""Forecasters on series whose answers are known: windows to train on, rolling origins, figures, widths of intervals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.forecasting import Cell, Forecaster, ForecasterConfig
from models.training.calibration import calibrated, transfer_errors
from models.training.data import Series
from models.training.forecast_eval import (
    Inputs,
    baselines,
    comparisons,
    evaluate,
    forecast_by,
    held_out,
    overlap,
    quantiles_of,
    rolling_origins,
    usable_origins,
)
from models.training.series import ForecastingProblem, Windows
from rafaga.bundle import ForecastSpec
from rafaga.evaluation import DRIFT, SEASONAL_NAIVE, training_size
from tests.models.support import RecordedSteps

SPEC = ForecastSpec(
    min_history=8, max_history=20, max_horizon=3, quantile_levels=(0.1, 0.5, 0.9), season=4, step="step", unit="x"
)
CONFIG = ForecasterConfig(
    cell=Cell.GRU, hidden=4, season=4, max_horizon=3, quantile_levels=(0.1, 0.5, 0.9), recent=20, drift=False, linear=8
)
LINE = np.arange(100, dtype=np.float32)
# Each value is half of the one before and half of the one a season before, plus noise.
NOISE = np.random.default_rng(0).normal(0, 1, 400).astype(np.float32)
for _step in range(4, 400):
    NOISE[_step] = 0.5 * NOISE[_step - 1] + 0.4 * NOISE[_step - 4] + 0.1 * NOISE[_step]


def problem(full: float = 0.0, known: bool = False, series: Series = NOISE) -> ForecastingProblem:
    torch.manual_seed(0)
    covariates = [np.stack([NOISE, np.full(400, 7, np.float32)], axis=1)] if known else []
    module = Forecaster(replace(CONFIG, covariates=2 if known else 0))
    return ForecastingProblem(module, SPEC, [series], "x", Windows(32, 1, 0.0, 2, full), covariates=covariates)


@pytest.mark.parametrize("full", [0.0, 1.0])
def test_histories_are_of_any_length_or_full(full: float) -> None:
    length = problem(full).windows()[4]
    longest = int(length.max())
    assert longest <= 20
    assert len(set(length.tolist())) > 5 if not full else (length == 20).float().mean() > 0.9, "near the start, shorter"


def test_covariates_are_those_of_the_steps_and_are_standardised_in_training_data() -> None:
    drawn = problem(known=True)
    future, known, _, history, length, past, later = drawn.windows()
    inside = torch.arange(history.shape[1]) < length[:, None]
    assert torch.equal(past[..., 0] * inside, history)
    assert torch.equal(later[..., 0][known], future[known])
    assert drawn.module.covariate_mean.tolist() == pytest.approx([NOISE[:320].mean(), 7], abs=1e-6)
    assert drawn.module.covariate_deviation[1] == 1, "a constant one is not divided by zero"


def test_the_linear_forecast_is_better_than_the_seasonal_naive_one() -> None:
    fitted = problem()
    history, length, future, _ = fitted._seen()
    view = fitted.module.scaled(history, length)
    linear = view.naive + fitted.module.latest(history, view.last) @ fitted.module.linear
    naive_error, linear_error = ((future - found).abs().mean() for found in (view.naive, linear))
    assert linear_error < 0.9 * naive_error


def test_filled_values_are_not_learned() -> None:
    """Missing values of histories are filled. Those of futures do not count, nor do histories that end in a gap."""
    series = np.arange(400, dtype=np.float32)
    missing = np.arange(400) % 7 == 3
    series[missing] = np.nan
    future, known, _, history, length, *_ = problem(series=series).windows()
    last = history[torch.arange(len(length)), length - 1]
    assert torch.equal(future[:, 0], last + 1), "gaps in a line are filled with its values"
    assert not known[torch.from_numpy(missing)[future.long()]].any()
    assert not known[torch.from_numpy(missing)[last.long()]].any()
    assert known.float().mean() > 0.6


def test_the_last_fifth_is_held_out() -> None:
    origins = held_out([LINE], SPEC)
    assert training_size(LINE) == 80
    assert len(origins.length) == 18  # 80 .. 97: three steps ahead still end inside
    assert origins.future[0].tolist() == [80, 81, 82]
    assert origins.future[-1].tolist() == [97, 98, 99]
    assert (origins.history[:, -1] == origins.future[:, 0] - 1).all()
    assert set(origins.length) == {20}  # the longest that the model takes


def test_short_histories_are_padded_with_zeros_and_overlap_counts_origins() -> None:
    origins = rolling_origins(LINE, SPEC, start=0, stop=15)
    assert origins.length.tolist() == [8, 9, 10, 11, 12]
    assert origins.history[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0]
    assert (overlap(origins), overlap(rolling_origins(LINE, SPEC, 80, 100, stride=2))) == (3, 2)
    double = rolling_origins(LINE * 2, SPEC, 0, 15)
    assert (forecast_by(DRIFT, double, SPEC) == double.future).all()


def test_origins_have_a_history_that_the_server_accepts_and_an_observed_horizon() -> None:
    """Gaps at 30, 31 and 40 are filled from values before the origin; of ten from 60 on, at most four may be missing in
    the 20 that the model reads."""
    series = LINE.copy()
    series[[30, 31, 40, *range(60, 70)]] = np.nan
    assert usable_origins(series, SPEC, 0, 42) == [*range(8, 28), *range(32, 38)]
    assert usable_origins(series, SPEC, 56, 100) == [56, 57, *range(86, 98)]
    origins = rolling_origins(series, SPEC, 32, 36, stride=2)
    assert origins.future.tolist() == [[32, 33, 34]]
    assert origins.history[0, -4:].tolist() == [28, 29, 29, 29]
    assert rolling_origins(series, SPEC, 33, 36).history[0, -4:].tolist() == [29, 30, 31, 32]


def test_figures_of_a_forecast_that_is_always_one_too_low() -> None:
    origins = held_out([LINE], SPEC)

    def forecast(inputs: Inputs) -> Series:
        history, length = inputs.values()
        last = history[np.arange(len(length)), length - 1]
        median = last[:, None] + np.array([0, 1, 2], dtype=np.float32)
        return np.stack([median - 2, median, median + 2], axis=2)

    figures = {m.name: m.value for m in evaluate(origins, SPEC, quantiles_of(forecast, origins), "a line")}
    assert figures["mase"] == pytest.approx(1 / 4)  # one off, where the seasonal-naive forecast is 4 off
    assert figures["coverage_80"] == 1
    assert figures["pinball"] == pytest.approx((0.1 * 3 + 0.5 * 1 + 0.1 * 1) / 3)


def test_baselines_of_a_seasonal_series() -> None:
    rng = np.random.default_rng(0)
    series = np.tile(np.array([1, 5, 2, 8]), 15) + np.arange(60) * 0.5 + rng.normal(0, 0.1, 60)
    origins, steps = held_out([series.astype(np.float32)], SPEC), RecordedSteps()
    naive = forecast_by(SEASONAL_NAIVE, origins, SPEC)
    assert np.abs(origins.future - naive).mean() == pytest.approx(2, abs=0.1)  # half a unit per step, four steps
    truth = np.repeat(origins.future[:, :, None], 3, axis=2)
    found = list(comparisons(origins, SPEC, truth, baselines(origins, SPEC, steps)))
    assert all(c.model_error == 0 for c in found)
    figures = {c.baseline.metric: c.baseline_error for c in found}
    assert figures["mase_seasonal_naive"] == pytest.approx(1, abs=0.05)
    assert figures["mase_holt_winters"] < 0.2
    assert list(steps.progress.values()) == 2 * [(len(origins.length), len(origins.length))]


def test_each_block_is_measured_with_the_width_that_the_others_give() -> None:
    """Three blocks of distances 0 to 1, 0 to 2 and 0 to 3, and one interval that should hold half of them."""
    blocks = [np.linspace(0, most, 1001, dtype=np.float32)[:, None] for most in (1, 2, 3)]
    found = calibrated(blocks, {"coverage_50": 0.5})
    assert (found.blocks, found.spread) == (3, pytest.approx(0.818, abs=1e-3))  # 0.818 / 1 + ... / 2 + ... / 3 = 1.5
    (share,) = found.coverage
    assert (share.name, share.nominal) == ("coverage_50", 0.5)
    assert (share.lowest, share.highest) == (pytest.approx(2 / 9, abs=1e-3), 1)  # 2/3 of 3, and 1.2 of 1
    assert share.mean == pytest.approx((2 / 9 + 3 / 8 + 1) / 3, abs=1e-3)  # 3/4 of 2
    assert share.deviation == pytest.approx(np.std([2 / 9, 3 / 8, 1], ddof=1), abs=1e-3)
    # One block has its own width.
    (share,) = calibrated([np.arange(101, dtype=np.float32)[:, None]], {"coverage_80": 0.8}).coverage
    assert (share.mean, share.deviation) == (pytest.approx(0.8, abs=0.01), 0)


def test_each_later_span_is_measured_with_the_width_that_those_before_it_give() -> None:
    """The median of 0 to 1 is 0.5, a quarter of 0 to 2; of both, 2/3, a sixth of 0 to 4."""
    spans = [np.linspace(0, most, 1001, dtype=np.float32)[:, None] for most in (1, 2, 4)]
    found = transfer_errors(spans, {"coverage_50": 0.5})
    assert found == {"coverage_50": pytest.approx(np.sqrt((0.25**2 + (1 / 3) ** 2) / 2), abs=1e-3)}
