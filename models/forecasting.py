"""Recurrent forecasters with a multi-horizon quantile head, after MQ-RNN (Wen et al. 2017).

The recurrent network reads the history once and predicts, for every step of the horizon and every quantile level, the
distance from the seasonal-naive forecast. All scaling is inside the model and masked by `length`: padding never affects
an answer, so histories of different lengths share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_RIDGE = 0.02  # penalty of squared weights, in units of the errors


class Cell(StrEnum):
    RNN = "rnn"  # Elman 1990
    LSTM = "lstm"  # Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000
    GRU = "gru"  # Cho et al. 2014


@dataclass(frozen=True)
class ForecasterConfig:
    cell: Cell
    hidden: int
    season: int  # steps in one period; 1 without a season
    max_horizon: int
    quantile_levels: tuple[float, ...]  # ascending, 0.5 among them
    recent: (
        int  # steps over which drift, level and scale are computed: enough to be stable, few enough to follow changes
    )
    drift: bool  # repeat the mean change from season to season; off for series without a trend
    adaptive: bool = False  # scale the quantiles by how far the history moved; for series without a season
    linear: int = 0  # the latest steps of a linear forecast, to which the network adds (LSTNet, Lai et al. 2018)
    covariates: int = 0  # series known in advance


class ElmanRNN(nn.RNN):
    """nn.RNN, one layer, batch first, exported as ONNX's RNN operator.

    torch.export would unroll it to the length of the example, while an LSTM stays one operator of any length.
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__(inputs, hidden, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # always from a state of zeros
        if not torch.onnx.is_in_onnx_export():
            return super().forward(x)
        weights = (self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0)
        return _as_operator("::RNN", x, weights, {"hidden_size": self.hidden_size})


class GRU(nn.GRU):
    """nn.GRU, one layer, batch first, exported as ONNX's GRU operator for the same reason."""

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__(inputs, hidden, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # always from a state of zeros
        if not torch.onnx.is_in_onnx_export():
            return super().forward(x)
        weights = (self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0)
        # PyTorch stores the gates as reset, update, new; ONNX as update, reset, new.
        ordered = [torch.cat([update, reset, new]) for reset, update, new in (w.chunk(3) for w in weights)]
        return _as_operator("::GRU", x, ordered, {"hidden_size": self.hidden_size, "linear_before_reset": 1})


def _as_operator(
    operator: str, x: Tensor, weights: Sequence[Tensor], attributes: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """One of ONNX's recurrent operators. x [N, T, inputs] -> states [N, T, hidden], final state [1, N, hidden]"""
    n, t, _ = x.shape
    hidden = attributes["hidden_size"]
    of_input, of_state, *biases = weights
    states, final = torch.onnx.ops.symbolic_multi_out(
        operator,
        (x.transpose(0, 1), of_input[None], of_state[None], torch.cat(biases)[None]),  # the first is [T, N, inputs]
        attributes,
        dtypes=(x.dtype, x.dtype),
        shapes=((t, 1, n, hidden), (1, n, hidden)),
    )
    return states[:, 0].transpose(0, 1), final


class Scaled(NamedTuple):
    """What the network reads of a history. Padding is zero in `change` and `features`."""

    last: Tensor  # [N, 1], the last valid step
    valid: Tensor  # [N, T]
    change: Tensor  # [N, T], from season to season
    features: Tensor  # [N, T, 3], in the unit of the history
    scale: Tensor  # [N, 1]
    before: Tensor  # [N, H], the step of the last season with the phase of the step to forecast
    naive: Tensor  # [N, H], the seasonal-naive forecast


class Forecaster(nn.Module):
    """history float32 [N, T] right-padded, length int64 [N] -> quantiles float32 [N, max_horizon, Q], same unit.

    Every `length` must be at least two seasons (two steps without a season) and at most T. Quantiles never cross.
    With C covariates, also past_covariates float32 [N, T, C], padded likewise, and future_covariates
    float32 [N, max_horizon, C].
    """

    spread: Tensor
    linear: Tensor
    covariate_mean: Tensor
    covariate_deviation: Tensor

    def __init__(self, config: ForecasterConfig) -> None:
        super().__init__()
        if config.adaptive and config.season != 1:
            raise ValueError(
                f"adaptive quantiles: expected a series without a season, got one of {config.season} steps"
            )
        self.config = config
        self.median = config.quantile_levels.index(0.5)
        hidden, inputs, levels = config.hidden, 3 + config.covariates, len(config.quantile_levels)
        match config.cell:
            case Cell.LSTM:
                self.recurrent: nn.Module = nn.LSTM(inputs, hidden, batch_first=True)
            case Cell.GRU:
                self.recurrent = GRU(inputs, hidden)
            case Cell.RNN:
                self.recurrent = ElmanRNN(inputs, hidden)
        self.head = nn.Linear(hidden, config.max_horizon * levels)
        # Widens or narrows the quantiles around the median; fitted after training, to data that training did not see.
        self.register_buffer("spread", torch.ones(()))
        if config.linear:  # fitted in closed form, not by gradients
            self.register_buffer("linear", torch.zeros(config.linear, config.max_horizon))
        if config.covariates:
            # What the covariates of a step change in its quantiles: the local network of Wen et al. 2017.
            self.local = nn.Sequential(
                nn.Linear(hidden + 2 * config.covariates, hidden), nn.Tanh(), nn.Linear(hidden, levels)
            )
            # In the training data.
            self.register_buffer("covariate_mean", torch.zeros(config.covariates))
            self.register_buffer("covariate_deviation", torch.ones(config.covariates))

    def forward(
        self,
        history: Tensor,
        length: Tensor,
        past_covariates: Tensor | None = None,
        future_covariates: Tensor | None = None,
    ) -> Tensor:
        view = self.scaled(history, length)
        features = view.features / view.scale[:, :, None]  # [N, T, 3]
        if past_covariates is not None:
            past_covariates = self.standardised(past_covariates)
            features = torch.cat([features, past_covariates * view.valid[:, :, None]], dim=2)  # [N, T, 3 + C]
        states, _ = self.recurrent(features)  # [N, T, hidden]
        # The network is causal: the state at the last valid step does not depend on the padding after it.
        state = rows_of(states, view.last)[:, 0]  # [N, hidden]

        residual = self.head(state).unflatten(1, (self.config.max_horizon, -1))  # [N, H, Q]
        if past_covariates is not None and future_covariates is not None:
            # Those of the naive forecast too: the residual is the difference from it.
            beside = [self.standardised(future_covariates), rows_of(past_covariates, view.before)]
            states_ahead = state[:, None].expand(-1, self.config.max_horizon, -1)
            residual = residual + self.local(torch.cat([states_ahead, *beside], dim=2))
        width = self.spread
        if self.config.adaptive and not self.training:  # like the spread, not trained
            width = width * self.past_moves(history, view.change.abs(), view.valid)[:, :, None]
        base = view.naive
        if self.config.linear:
            base = base + self.latest(history, view.last) @ self.linear
        return base[:, :, None] + view.scale[:, :, None] * self.ordered(residual, width)

    def scaled(self, history: Tensor, length: Tensor) -> Scaled:
        """The history in terms that do not depend on its level and unit."""
        season = self.config.season
        last = length[:, None] - 1  # [N, 1]
        step = torch.arange(history.size(1), device=history.device)[None, :]  # [1, T]
        valid = step <= last  # [N, T]

        recent = valid & (step > last - self.config.recent)  # [N, T]

        # The change from season to season, its mean (the drift) and its mean size (the unit of everything below).
        seasoned = step >= season  # [1, T]
        change = (history - F.pad(history, (season, 0))[:, : history.size(1)]) * valid * seasoned  # [N, T]
        drift = mean_where(change, recent & seasoned)  # [N, 1]
        scale = mean_where((change - drift).abs(), recent & seasoned) + 1e-6  # [N, 1]

        level = mean_where(history, recent)  # [N, 1]
        centred = (history - level) * valid  # [N, T]
        local = F.avg_pool1d(F.pad(centred, (season - 1, 0)), season, stride=1)  # [N, T], mean of the season up to here
        surprise = (change - drift) * valid * seasoned  # [N, T]
        features = torch.stack([surprise, centred - local, centred], dim=2)  # [N, T, 3]

        ahead = torch.arange(self.config.max_horizon, device=history.device)[None, :]  # [1, H]
        before = length[:, None] - season + ahead % season  # [N, H]
        naive = history.gather(1, before)  # [N, H]
        if self.config.drift:
            naive = naive + drift * (1 + ahead // season)
        return Scaled(last, valid, change, features, scale, before, naive)

    def fit_linear(self, history: Tensor, length: Tensor, future: Tensor, unit: Tensor) -> None:
        """Fits the linear forecast to `future` [N, max_horizon] by ridge regression. `unit` [N] divides errors."""
        view = self.scaled(history, length)
        x, y = self.latest(history, view.last) / unit[:, None], (future - view.naive) / unit[:, None]
        penalty = _RIDGE * len(x) * torch.eye(self.config.linear)
        self.linear.copy_(torch.linalg.solve(x.T @ x + penalty, x.T @ y))

    def standardised(self, covariates: Tensor) -> Tensor:
        return (covariates - self.covariate_mean) / self.covariate_deviation

    def latest(self, history: Tensor, last: Tensor) -> Tensor:
        """The `linear` steps up to `last` [N, 1], minus the value there; before the start, the first season repeats."""
        index = last - torch.arange(self.config.linear - 1, -1, -1, device=history.device)[None, :]  # [N, linear]
        found = history.gather(1, torch.where(index < 0, index % self.config.season, index))
        return found - found[:, -1:]

    def past_moves(self, history: Tensor, change: Tensor, valid: Tensor) -> Tensor:
        """How far the history moved over several steps, relative to what its single steps predict. [N, 1]

        1 for a random walk with steps of constant size; more for a trend, or after a rise in volatility: there the
        recent steps, which are the unit of all quantiles, underestimate future moves. This is the idea of the variance
        ratio (Lo & MacKinlay 1988), with mean sizes instead of variances, which single crashes would dominate.
        """
        window, total = self.config.recent, history.size(1)
        step = torch.arange(total, device=history.device)[None, :]  # [1, T]
        expected = F.avg_pool1d(F.pad(change, (window - 1, 0)), window, stride=1)  # [N, T], mean size of recent changes
        ratios = []
        for ahead in (self.config.max_horizon // 4, self.config.max_horizon // 2, self.config.max_horizon):
            before, unit = (F.pad(x, (ahead, 0))[:, :total] for x in (history, expected))
            chosen = valid & (step >= window + ahead)
            moves = torch.where(chosen, (history - before).abs() / (unit * ahead**0.5 + 1e-6), 0.0)
            # One more move of the expected size: a history that is too short gets 1.
            ratios.append((moves.sum(1, keepdim=True) + 1) / (chosen.sum(1, keepdim=True) + 1))
        return torch.stack(ratios).mean(0)

    def ordered(self, residual: Tensor, width: Tensor) -> Tensor:
        """[N, H, Q] free numbers -> ascending: the median unchanged, the others at positive distances from it.

        `width` multiplies the gaps: [] or [N, 1, 1].
        """
        middle = residual[:, :, self.median : self.median + 1]
        gaps = F.softplus(residual)
        above = gaps[:, :, self.median + 1 :].cumsum(2)
        below = gaps[:, :, : self.median].flip(2).cumsum(2).flip(2)
        return middle + width * torch.cat([-below, torch.zeros_like(middle), above], dim=2)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """The steps `index` [N, S] of `x` [N, T, C]. [N, S, C]"""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.size(2)))


def mean_where(x: Tensor, chosen: Tensor) -> Tensor:
    """Mean of `x` [N, T] over the chosen steps. [N, 1]"""
    return (x * chosen).sum(1, keepdim=True) / chosen.sum(1, keepdim=True)
