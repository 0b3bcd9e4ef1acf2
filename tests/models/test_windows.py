"""Windows of series that training draws, and the linear forecast that is fitted to them in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.forecasting import Cell, Forecaster, ForecasterConfig
from models.training.data import Series
from models.training.series import ForecastingProblem, Windows
from rafaga.bundle import ForecastSpec

SPEC = ForecastSpec(
    min_history=8, max_history=20, max_horizon=3, quantile_levels=(0.1, 0.5, 0.9), season=4, step="step", unit="x"
)
CONFIG = ForecasterConfig(
    cell=Cell.GRU, hidden=4, season=4, max_horizon=3, quantile_levels=(0.1, 0.5, 0.9), recent=20, drift=False, linear=8
)
# Each value is half of the one before and half of the one a season before, plus noise.
RNG = np.random.default_rng(0)
SERIES = RNG.normal(0, 1, 400).astype(np.float32)
for _step in range(4, 400):
    SERIES[_step] = 0.5 * SERIES[_step - 1] + 0.4 * SERIES[_step - 4] + 0.1 * SERIES[_step]


def problem(full: float = 0.0, known: bool = False, series: Series = SERIES) -> ForecastingProblem:
    torch.manual_seed(0)
    covariates = [np.stack([SERIES, np.full(400, 7, np.float32)], axis=1)] if known else []
    module = Forecaster(CONFIG) if not known else Forecaster(ForecasterConfig(**{**vars(CONFIG), "covariates": 2}))
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
    assert drawn.module.covariate_mean.tolist() == pytest.approx([SERIES[:320].mean(), 7], abs=1e-6)
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
