"""Rolling origins, figures and baselines, on series whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

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
from rafaga.bundle import ForecastSpec
from rafaga.evaluation import DRIFT, SEASONAL_NAIVE, training_size
from tests.models.support import RecordedSteps

SPEC = ForecastSpec(
    min_history=8, max_history=20, max_horizon=3, quantile_levels=(0.1, 0.5, 0.9), season=4, step="quarter", unit="x"
)
SERIES = np.arange(100, dtype=np.float32)


def test_the_last_fifth_is_held_out() -> None:
    origins = held_out([SERIES], SPEC)
    assert training_size(SERIES) == 80
    assert len(origins.length) == 18  # 80 .. 97: three steps ahead still end inside
    assert origins.future[0].tolist() == [80, 81, 82]
    assert origins.future[-1].tolist() == [97, 98, 99]
    assert (origins.history[:, -1] == origins.future[:, 0] - 1).all()
    assert set(origins.length) == {20}  # the longest that the model takes


def test_short_histories_are_padded_with_zeros_and_overlap_counts_origins() -> None:
    origins = rolling_origins(SERIES, SPEC, start=0, stop=15)
    assert origins.length.tolist() == [8, 9, 10, 11, 12]
    assert origins.history[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0]
    assert (overlap(origins), overlap(rolling_origins(SERIES, SPEC, 80, 100, stride=2))) == (3, 2)
    double = rolling_origins(SERIES * 2, SPEC, 0, 15)
    assert (forecast_by(DRIFT, double, SPEC) == double.future).all()


def test_origins_have_a_history_that_the_server_accepts_and_an_observed_horizon() -> None:
    """Gaps at 30, 31 and 40 are filled from values before the origin; of ten from 60 on, at most four may be missing in
    the 20 that the model reads."""
    series = SERIES.copy()
    series[[30, 31, 40, *range(60, 70)]] = np.nan
    assert usable_origins(series, SPEC, 0, 42) == [*range(8, 28), *range(32, 38)]
    assert usable_origins(series, SPEC, 56, 100) == [56, 57, *range(86, 98)]
    origins = rolling_origins(series, SPEC, 32, 36, stride=2)
    assert origins.future.tolist() == [[32, 33, 34]]
    assert origins.history[0, -4:].tolist() == [28, 29, 29, 29]
    assert rolling_origins(series, SPEC, 33, 36).history[0, -4:].tolist() == [29, 30, 31, 32]


def test_figures_of_a_forecast_that_is_always_one_too_low() -> None:
    origins = held_out([SERIES], SPEC)

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
