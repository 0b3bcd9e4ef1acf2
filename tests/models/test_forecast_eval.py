"""Rolling origins, figures and baselines, on series whose answers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.training.data import Series
from models.training.forecast_eval import (
    Inputs,
    baselines,
    compared,
    comparisons,
    drift,
    evaluate,
    held_out,
    overlap,
    quantiles_of,
    rolling_origins,
    seasonal_naive,
    shares,
    standard_error,
    training_size,
)
from rafaga.bundle import ForecastSpec
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
    assert (drift(rolling_origins(SERIES * 2, SPEC, 0, 15)) == rolling_origins(SERIES * 2, SPEC, 0, 15).future).all()


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


def test_a_quantile_holds_what_lies_at_it_or_below() -> None:
    """Of 1 to 15, the interval from 0 to 12 holds twelve: none lies below it, three lie above, one at its end."""
    origins = replace(rolling_origins(SERIES, SPEC, 8, 15), future=np.arange(1, 16, dtype=np.float32).reshape(5, 3))
    quantiles = np.broadcast_to(np.array([0, 6, 12], dtype=np.float32), (5, 3, 3))
    assert {s.name: s.held.mean() for s in shares(origins, SPEC, quantiles)} == {
        "coverage_80": pytest.approx(0.8),
        "coverage_q10": 0,
        "coverage_q50": pytest.approx(0.4),
        "coverage_q90": pytest.approx(0.8),
    }


def test_overlapping_origins_widen_the_standard_error_of_a_share() -> None:
    rng = np.random.default_rng(1)
    alone = (rng.random(2000) < 0.5).astype(float)
    together = np.repeat((rng.random(500) < 0.5).astype(float), 4)
    assert standard_error(alone, 1) == pytest.approx(0.5 / 2000**0.5, rel=0.1)
    assert standard_error(together, 40) == pytest.approx(0.5 / 500**0.5, rel=0.2)
    assert standard_error(alone[:3], 24) == pytest.approx(0), "there is one block only"
    two = np.repeat([0, 1], 1000)
    assert standard_error(alone + 9 * two, 1, two) == pytest.approx(0.5 / 2000**0.5, rel=0.1), "series are not mixed"


def test_overlapping_horizons_widen_the_standard_error_of_a_difference() -> None:
    """Means of three neighbours, as horizons of three steps are: the variance of their mean is three times larger."""
    noise = np.random.default_rng(0).normal(0, 1, 6002)
    together = np.convolve(noise, np.ones(3) / 3, mode="valid")
    alone = compared("mase_seasonal_naive", noise, np.zeros(6002), 1)
    assert alone.standard_error == pytest.approx(1 / 6002**0.5, rel=0.1)
    assert compared("mase_seasonal_naive", together, np.zeros(6000), 3).standard_error == pytest.approx(
        1 / 6000**0.5, rel=0.2
    )
    found = compared("mase_seasonal_naive", np.array([1.0, 2, 3, 4] * 20), np.array([2.0, 3, 4, 5] * 20), 2)
    assert (found.network_mase, found.baseline_mase, found.difference) == (2.5, 3.5, -1)


def test_baselines_of_a_seasonal_series() -> None:
    rng = np.random.default_rng(0)
    series = np.tile(np.array([1, 5, 2, 8]), 15) + np.arange(60) * 0.5 + rng.normal(0, 0.1, 60)
    origins, steps = held_out([series.astype(np.float32)], SPEC), RecordedSteps()
    naive = seasonal_naive(origins, SPEC)
    assert np.abs(origins.future - naive).mean() == pytest.approx(2, abs=0.1)  # half a unit per step, four steps
    truth = np.repeat(origins.future[:, :, None], 3, axis=2)
    found = list(comparisons(origins, SPEC, truth, baselines(origins, SPEC, steps)))
    assert all(c.network_mase == 0 for c in found)
    figures = {c.metric: c.baseline_mase for c in found}
    assert figures["mase_seasonal_naive"] == pytest.approx(1, abs=0.05)
    assert figures["mase_holt_winters"] < 0.2
    assert list(steps.progress.values()) == [(len(origins.length), len(origins.length))]
