"""Rolling origins, figures and baselines, on series whose answers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.entry import SeriesInput
from models.training.coverage import standard_error
from models.training.forecast_eval import (
    Share,
    baselines,
    drift,
    evaluate,
    held_out,
    overlap,
    rolling_origins,
    seasonal_naive,
    shares,
    training_size,
)
from models.training.significance import compared

SPEC = SeriesInput(
    min_history=8, max_history=20, max_horizon=3, quantile_levels=(0.1, 0.5, 0.9), season=4, step="quarter", unit="x"
)
SERIES = np.arange(100, dtype=np.float32)


def test_the_last_fifth_is_held_out() -> None:
    origins = held_out(SERIES, SPEC)
    assert training_size(SERIES) == 80
    assert len(origins.length) == 18  # 80 .. 97: three steps ahead still end inside
    assert origins.future[0].tolist() == [80, 81, 82]
    assert origins.future[-1].tolist() == [97, 98, 99]
    assert (origins.history[:, -1] == origins.future[:, 0] - 1).all()
    assert set(origins.length) == {20}  # the longest that the model takes


def test_short_histories_are_padded_with_zeros() -> None:
    origins = rolling_origins(SERIES, SPEC, start=0, stop=15)
    assert origins.length.tolist() == [8, 9, 10, 11, 12]
    assert origins.history[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0]


def test_figures_of_a_forecast_that_is_always_one_too_low() -> None:
    origins = held_out(SERIES, SPEC)

    def forecast(history: np.ndarray, length: np.ndarray) -> np.ndarray:
        last = history[np.arange(len(length)), length - 1]
        median = last[:, None] + np.array([0, 1, 2], dtype=np.float32)
        return np.stack([median - 2, median, median + 2], axis=2)

    figures = {m.name: m.value for m in evaluate(origins, SPEC, forecast, "a line")}
    assert figures["mase"] == pytest.approx(1 / 4)  # one off, where the seasonal-naive forecast is 4 off
    assert figures["coverage_80"] == 1
    assert figures["pinball"] == pytest.approx((0.1 * 3 + 0.5 * 1 + 0.1 * 1) / 3)


def test_coverage_counts_observations_inside() -> None:
    origins = held_out(SERIES, SPEC)
    too_high = [np.full((18, 3, 3), 1e3, dtype=np.float32)]
    figures = {m.name: m.value for m in evaluate(origins, SPEC, lambda *_: too_high[0], "a line")}
    assert figures["coverage_80"] == 0


def test_a_quantile_holds_what_lies_at_it_or_below() -> None:
    """Four origins, three steps: 5 stands at the quantile of 10 %, below that of 50 % and above that of 90 %."""
    origins = rolling_origins(SERIES, SPEC, start=8, stop=14)
    levels = np.array([5, 6, 4], dtype=np.float32)  # crossed on purpose: every level is counted for itself
    quantiles = np.broadcast_to(levels, (4, 3, 3))
    five = replace(origins, future=np.full((4, 3), 5, dtype=np.float32))
    found = {s.name: (s.nominal, s.held.mean()) for s in shares(five, SPEC, quantiles)}
    assert found["coverage_q10"] == (0.1, 1)
    assert found["coverage_q50"] == (0.5, 1)
    assert found["coverage_q90"] == (0.9, 0)
    assert found["coverage_80"] == (pytest.approx(0.8), 0)


def test_intervals_may_be_right_where_their_quantiles_are_not() -> None:
    """Of 1 to 15, the interval from 0 to 12 holds twelve: none lies below it, three lie above."""
    origins = rolling_origins(SERIES, SPEC, start=8, stop=15)
    seen = np.arange(1, 16, dtype=np.float32).reshape(5, 3)
    quantiles = np.broadcast_to(np.array([0, 6, 12], dtype=np.float32), (5, 3, 3))
    found = {s.name: s.held.mean() for s in shares(replace(origins, future=seen), SPEC, quantiles)}
    assert found == {
        "coverage_80": pytest.approx(0.8),
        "coverage_q10": 0,
        "coverage_q50": pytest.approx(0.4),
        "coverage_q90": pytest.approx(0.8),
    }


def test_levels_are_named_in_percent_with_two_digits() -> None:
    spec = replace(SPEC, quantile_levels=(0.025, 0.05, 0.5, 0.95, 0.975))
    origins = rolling_origins(SERIES, SPEC, start=8, stop=15)
    names = [s.name for s in shares(origins, spec, np.zeros((5, 3, 5), dtype=np.float32))]
    assert names[:2] == ["coverage_95", "coverage_90"]
    assert names[2:] == ["coverage_q2.5", "coverage_q05", "coverage_q50", "coverage_q95", "coverage_q97.5"]


def test_origins_that_go_together_leave_a_share_less_certain() -> None:
    rng = np.random.default_rng(1)
    alone = rng.random((2000, 1)) < 0.5
    together = np.repeat(rng.random((500, 1)) < 0.5, 4, axis=0)
    assert standard_error(Share("", 0.5, alone), 1) == pytest.approx(0.5 / 2000**0.5, rel=0.1)
    assert standard_error(Share("", 0.5, together), 40) == pytest.approx(0.5 / 500**0.5, rel=0.2)
    assert standard_error(Share("", 0.5, alone[:3]), 24) == pytest.approx(0), "one block is all"


def test_baselines_of_a_seasonal_series() -> None:
    rng = np.random.default_rng(0)
    series = np.tile(np.array([1, 5, 2, 8]), 30) + np.arange(120) * 0.5 + rng.normal(0, 0.1, 120)
    origins = held_out(series.astype(np.float32), SPEC)
    naive = seasonal_naive(origins, SPEC)
    assert np.abs(origins.future - naive).mean() == pytest.approx(2, abs=0.1)  # half a unit per step, four steps
    figures = {m.name: m.value for m in baselines(origins, SPEC, "a line")}
    assert figures["mase_seasonal_naive"] == pytest.approx(1, abs=0.05)
    assert figures["mase_holt_winters"] < 0.2


def test_a_random_walk_with_drift_goes_on_as_the_history_did() -> None:
    origins = rolling_origins(SERIES * 2, SPEC, start=0, stop=15)
    assert (drift(origins) == origins.future).all()


def test_overlapping_horizons_widen_the_error_of_a_difference() -> None:
    """Means of three neighbours, as horizons of three steps are: their mean is three times less certain in variance."""
    noise = np.random.default_rng(0).normal(0, 1, 6002)
    together = np.convolve(noise, np.ones(3) / 3, mode="valid")
    alone = compared("naive", noise, np.zeros(6002), 1)
    assert alone.standard_error == pytest.approx(1 / 6002**0.5, rel=0.1)
    assert compared("naive", together, np.zeros(6000), 3).standard_error == pytest.approx(1 / 6000**0.5, rel=0.2)
    assert together.std() / 6000**0.5 < 0.6 / 6000**0.5, "what the overlap would hide"


def test_overlap_counts_origins() -> None:
    assert overlap(rolling_origins(SERIES, SPEC, 80, 100)) == 3
    assert overlap(rolling_origins(SERIES, SPEC, 80, 100, stride=2)) == 2


def test_a_network_that_errs_less_is_told_by_how_much() -> None:
    found = compared("naive", np.array([1.0, 2, 3, 4] * 20), np.array([2.0, 3, 4, 5] * 20), 2)
    assert (found.network_mase, found.baseline_mase, found.difference) == (2.5, 3.5, -1)
    assert found.standard_error == pytest.approx(0)
