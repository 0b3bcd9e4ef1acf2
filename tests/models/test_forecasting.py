"""Forecasters: padding never shows, quantiles never cross, and ONNX answers as PyTorch does at every length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from export.graph import serving_graph
from export.onnx import to_onnx
from models.forecasting import GRU, Cell, ElmanRNN, Forecaster, ForecasterConfig
from models.loading import load_weights
from models.zoo import catalogue
from rafaga.bundle import ForecastSpec

CONFIG = ForecasterConfig(
    cell=Cell.LSTM, hidden=8, season=4, max_horizon=6, quantile_levels=(0.1, 0.5, 0.9), recent=40, drift=True
)
KNOWN = replace(CONFIG, covariates=2)
WALK = replace(CONFIG, season=1, max_horizon=8, recent=10, drift=False, adaptive=True)


def histories(lengths: list[int], total: int, season: int) -> tuple[Tensor, Tensor]:
    """Rising, seasonal, noisy; zeros behind the end. [N, total], [N]"""
    torch.manual_seed(1)
    step = torch.arange(total)
    rows = 300 + 0.1 * step + 3 * torch.sin(2 * torch.pi * step / season) + torch.randn(len(lengths), total)
    length = torch.tensor(lengths)
    return rows * (step < length[:, None]), length


@pytest.fixture(params=[*Cell, "adaptive"])
def module(request: pytest.FixtureRequest) -> Forecaster:
    torch.manual_seed(0)
    if request.param == "adaptive":
        return Forecaster(replace(CONFIG, season=1, adaptive=True, recent=5)).eval()
    return Forecaster(replace(CONFIG, cell=request.param)).eval()


def test_ragged_histories_share_a_batch_and_padding_is_never_read(module: Forecaster) -> None:
    history, length = histories([8, 30, 19, 60], total=60, season=4)
    together = module(history, length)
    for row, n in enumerate(length.tolist()):
        alone = module(history[row : row + 1, :n], length[row : row + 1])
        assert torch.allclose(together[row], alone[0], atol=1e-4, rtol=0)  # of 300: a unit in the last place is 3e-5
    garbage = torch.where(history == 0, torch.tensor(1e6), history)
    assert torch.equal(together, module(garbage, length))


def test_padding_of_covariates_is_never_read_and_their_future_moves_the_forecast() -> None:
    torch.manual_seed(0)
    module = Forecaster(replace(KNOWN, linear=12)).eval()
    history, length = histories([8, 30], total=30, season=4)
    past, future = torch.randn(2, 30, 2), torch.randn(2, 6, 2)
    together = module(history, length, past, future)
    alone = module(history[:1, :8], length[:1], past[:1, :8], future[:1])
    assert torch.allclose(together[0], alone[0], atol=1e-4, rtol=0)
    past[0, 8:] = 1e6
    assert torch.equal(together, module(history, length, past, future))
    future[0, 3] += 1
    moved = (module(history, length, past, future) != together).any(2)
    assert moved.tolist() == [[False, False, False, True, False, False], [False] * 6]


def test_the_first_season_repeats_before_the_start() -> None:
    module = Forecaster(replace(CONFIG, linear=6))
    x = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 0, 0, 0, 0]])
    found = module.latest(x, torch.tensor([[7], [3]]))
    assert found.tolist() == [[-5, -4, -3, -2, -1, 0], [-1, 0, -3, -2, -1, 0]]


def test_quantiles_ascend_follow_the_unit_and_stay_finite(module: Forecaster) -> None:
    history, length = histories([8, 60], total=60, season=4)
    expected = module(history[1:], length[1:]) * 10 + 500
    assert torch.allclose(module(history[1:] * 10 + 500, length[1:]), expected, atol=0.1, rtol=0)
    constant = module(torch.full((1, 12), 7.0), torch.tensor([12]))
    assert torch.allclose(constant, torch.tensor(7.0), atol=1e-3)
    nn.init.normal_(module.head.weight, std=10)  # far from anything that training gives
    assert (module(history, length).diff(dim=2) >= 0).all()


def test_a_zeroed_network_gives_the_seasonal_naive_forecast_with_drift() -> None:
    module = Forecaster(CONFIG).eval()
    nn.init.zeros_(module.head.weight)
    nn.init.zeros_(module.head.bias)
    season = torch.tensor([1.0, 5.0, 2.0, 8.0])
    history = torch.cat([season, season + 2, season + 4])[None]  # 2 more every season
    median = module(history, torch.tensor([12]))[0, :, 1]
    assert torch.allclose(median, torch.tensor([7.0, 11, 8, 14, 9, 13]), atol=1e-3)


@pytest.mark.parametrize(("kind", "torchs"), [(ElmanRNN, nn.RNN), (GRU, nn.GRU)])
def test_other_cells_are_torchs_own(kind: type[ElmanRNN | GRU], torchs: type[nn.RNN | nn.GRU]) -> None:
    torch.manual_seed(0)
    ours = kind(3, 5)
    reference = torchs(3, 5, batch_first=True)
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 3)
    assert torch.equal(ours(x)[0], reference(x)[0])


@pytest.mark.parametrize(
    "name", ["rnn-co2", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("lstm-co2", "lstm-ett", "lstm-sp500"))]
)
def test_onnx_gives_the_same_at_every_length(name: str, tmp_path: Path) -> None:
    entry = catalogue()[name]
    module = entry.build()
    load_weights(entry, module)
    graph = serving_graph(entry, module)
    assert isinstance(entry.input, ForecastSpec)
    shortest, longest = entry.input.min_history, entry.input.max_history
    history, length = histories([shortest + 16, shortest + 9], total=shortest + 16, season=12)
    to_onnx(graph, {"history": history.numpy(), "length": length.numpy()}, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for lengths, total in (([shortest], shortest), ([longest, shortest, 100], longest), ([50] * 5, 64), ([900], 900)):
        history, length = histories(lengths, total, season=12)
        inputs = {"history": history.numpy(), "length": length.numpy()}
        (found,) = session.run(None, inputs)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, graph.reference(inputs)["quantiles"], atol=2e-4)


def test_past_moves_compare_a_trend_with_its_steps() -> None:
    """1 for a random walk, more for a trend, less for a series that returns; 1 too where the history is too short."""

    def moves(history: Tensor) -> float:
        change = torch.diff(history, prepend=history[:, :1]).abs()
        seen = torch.ones_like(history, dtype=torch.bool)
        return float(Forecaster(WALK).eval().past_moves(history, change, seen))

    torch.manual_seed(0)
    steps = torch.randn(1, 5000)
    assert moves(steps.cumsum(1)) == pytest.approx(1, abs=0.1)
    assert moves((steps + 1).cumsum(1)) > 1.5
    back_and_forth = torch.where(torch.arange(5000) % 2 == 0, 1.0, -1.0)[None] + 0.01 * steps
    assert moves(back_and_forth) < 0.2
    assert moves(steps[:, :12].cumsum(1)) == 1


def test_adaptive_quantiles_are_wider_where_the_history_moved_further() -> None:
    torch.manual_seed(0)
    adaptive, plain = Forecaster(WALK).eval(), Forecaster(replace(WALK, adaptive=False)).eval()
    plain.load_state_dict(adaptive.state_dict())
    trend = (torch.randn(1, 200) + 1).cumsum(1)
    length = torch.tensor([200])
    wide, narrow = (module(trend, length)[0] for module in (adaptive, plain))
    assert torch.equal(wide[:, 1], narrow[:, 1]), "the median is the same"
    assert (wide[:, 2] - wide[:, 0] > 1.3 * (narrow[:, 2] - narrow[:, 0])).all()
    adaptive.train()
    assert torch.equal(adaptive(trend, length)[0], narrow), "training is not affected"
    with pytest.raises(ValueError, match="got one of 12 steps"):
        Forecaster(replace(WALK, season=12))
