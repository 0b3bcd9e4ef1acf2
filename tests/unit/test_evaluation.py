"""Figures of forecasts and baselines whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from rafaga.evaluation import (
    DRIFT,
    HOLT_WINTERS,
    SEASONAL_NAIVE,
    Baseline,
    Comparison,
    baselines_for,
    compared,
    naive_error,
    pinball,
    scaled_errors,
    shares,
    standard_error,
)

LEVELS = (0.1, 0.5, 0.9)


def test_a_quantile_holds_what_lies_at_it_or_below() -> None:
    """Of 1 to 15, the interval from 0 to 12 holds twelve: none lies below it, three lie above, one at its end."""
    truth = np.arange(1, 16, dtype=np.float32).reshape(5, 3)
    quantiles = np.broadcast_to(np.array([0, 6, 12], dtype=np.float32), (5, 3, 3))
    assert {s.name: s.held.mean() for s in shares(truth, quantiles, LEVELS)} == {
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
    alone = compared(SEASONAL_NAIVE, noise, np.zeros(6002), 1)
    assert alone.standard_error == pytest.approx(1 / 6002**0.5, rel=0.1)
    assert compared(SEASONAL_NAIVE, together, np.zeros(6000), 3).standard_error == pytest.approx(1 / 6000**0.5, rel=0.2)
    found = compared(SEASONAL_NAIVE, np.array([1.0, 2, 3, 4] * 20), np.array([2.0, 3, 4, 5] * 20), 2)
    assert (found.model_error, found.baseline_error, found.difference) == (2.5, 3.5, -1)


def test_the_verdict_says_which_is_better() -> None:
    def verdict(model: float, baseline: float) -> str:
        return Comparison(HOLT_WINTERS, model, baseline, 0.1).verdict()

    assert verdict(1.0, 0.5).startswith("Holt-Winters is better than this network: MASE 1.000, Holt-Winters 0.500")
    assert verdict(0.5, 1.0).startswith("better than Holt-Winters")
    assert verdict(0.9, 1.0) == (
        "no clear difference from Holt-Winters: MASE 0.900, Holt-Winters 1.000, difference -0.100 ± 0.100"
    )


def test_errors_of_a_known_forecast() -> None:
    series = np.array([0, 0, 1, 1, np.nan, 2], np.float32)
    assert naive_error(series, 2) == 1, "the missing value is left out"
    truth, low = np.array([[3.0, 5.0]]), np.array([[2.0, 4.0]])
    assert scaled_errors(truth, low, np.array([4.0])).tolist() == [0.25]
    quantiles = np.stack([low - 2, low, low + 2], axis=2)
    assert pinball(truth, quantiles, LEVELS) == pytest.approx([(0.1 * 3 + 0.5 * 1 + 0.1 * 1) / 3])


@pytest.mark.parametrize(
    ("baseline", "season"), [(SEASONAL_NAIVE, 4), (DRIFT, 1), (HOLT_WINTERS, 4), (HOLT_WINTERS, 1)]
)
def test_intervals_of_a_baseline_hold_their_share(baseline: Baseline, season: int) -> None:
    """On random walks, of each season or of each step, and on noise around a level for exponential smoothing."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(30):
        noise = rng.normal(0, 1, 48)
        series = noise if baseline is HOLT_WINTERS else noise.reshape(-1, season).cumsum(axis=0).ravel()
        quantiles = baseline.forecast(series[:40], season, 8).quantiles(LEVELS)
        held.append((quantiles[:, 0] <= series[40:]) & (series[40:] <= quantiles[:, 2]))
    assert np.mean(held) == pytest.approx(0.8, abs=0.1)
    assert baseline in baselines_for(season)
