"""Worked examples of convolutional and recurrent networks, each with the number that comes out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def output_size(n: int, f: int, p: int = 0, s: int = 1) -> int:
    return 1 + (n + 2 * p - f) // s


@pytest.mark.parametrize(
    ("n", "f", "p", "s"), [(7, 3, 0, 2), (32, 5, 0, 1), (28, 3, 1, 1), (224, 7, 3, 2), (6, 3, 0, 1)]
)
def test_size_of_a_convolution(n: int, f: int, p: int, s: int) -> None:
    assert F.conv2d(torch.zeros(1, 1, n, n), torch.zeros(1, 1, f, f), padding=p, stride=s).shape[2] == output_size(
        n, f, p, s
    )


def test_a_7x7_image_by_3x3_at_stride_2_is_3x3() -> None:
    assert output_size(7, 3, s=2) == 3


@pytest.mark.parametrize("f", [1, 3, 5, 7])
def test_same_padding_keeps_the_size(f: int) -> None:
    assert output_size(28, f, p=(f - 1) // 2) == 28


def test_max_pooling() -> None:
    image = torch.tensor([[12.0, 20, 30, 0], [8, 12, 2, 0], [34, 70, 37, 4], [112, 100, 25, 12]])
    assert F.max_pool2d(image[None, None], 2)[0, 0].tolist() == [[20, 30], [112, 37]]


def test_a_vertical_edge_is_found() -> None:
    image = torch.tensor([10.0, 10, 10, 0, 0, 0]).repeat(6, 1)
    edges = torch.tensor([[1.0, 0, -1]]).repeat(3, 1)
    assert F.conv2d(image[None, None], edges[None, None])[0, 0].tolist() == [[0, 30, 30, 0]] * 4


def test_softmax() -> None:
    probabilities = torch.tensor([8.0, 5, 0]).softmax(0)
    assert torch.allclose(probabilities, torch.tensor([0.9523, 0.0474, 0.0003]), atol=3e-4)
    assert int(probabilities.argmax()) == 0


def test_ten_filters_of_3x3x3_have_280_parameters() -> None:
    assert sum(p.numel() for p in nn.Conv2d(3, 10, 3).parameters()) == 280


def test_an_unrolled_rnn_is_the_recurrent_one() -> None:
    torch.manual_seed(0)
    rnn = nn.RNN(3, 5, batch_first=True)
    x = torch.randn(2, 3, 3)

    def f(h: Tensor, step: Tensor) -> Tensor:
        return (F.linear(step, rnn.weight_ih_l0, rnn.bias_ih_l0) + F.linear(h, rnn.weight_hh_l0, rnn.bias_hh_l0)).tanh()

    h3 = f(f(f(torch.zeros(2, 5), x[:, 0]), x[:, 1]), x[:, 2])
    assert torch.allclose(rnn(x)[0][:, -1], h3, atol=1e-6)


@pytest.mark.parametrize(("weight", "steps"), [(2.0, 4), (0.5, 50)])
def test_gradients_explode_and_vanish_by_the_power_of_the_weight(weight: float, steps: int) -> None:
    x = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    h = x
    for _ in range(steps):
        h = weight * h
    h.backward()
    assert x.grad is not None
    assert x.grad.item() == weight**steps == h.item()


@pytest.mark.parametrize(("weight", "steps"), [(2.0, 4), (0.5, 50)])
def test_so_do_those_of_a_recurrent_layer(weight: float, steps: int) -> None:
    rnn = nn.RNN(1, 1, nonlinearity="relu", bias=False).double()
    with torch.no_grad():
        rnn.weight_ih_l0.fill_(1)
        rnn.weight_hh_l0.fill_(weight)
    x = torch.zeros(1 + steps, 1, dtype=torch.float64)
    x[0] = 3
    x.requires_grad_()
    states, _ = rnn(x)
    states[-1].backward()
    assert states[-1].item() == 3 * weight**steps
    assert x.grad is not None
    assert x.grad[0].item() == weight**steps


def test_the_gates_of_an_lstm() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4, batch_first=True)
    x = torch.randn(2, 9, 3)
    h, c = torch.zeros(2, 4), torch.zeros(2, 4)
    for t in range(9):
        gates = F.linear(x[:, t], lstm.weight_ih_l0, lstm.bias_ih_l0) + F.linear(h, lstm.weight_hh_l0, lstm.bias_hh_l0)
        i, f, g, o = gates.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    states, (h_n, c_n) = lstm(x)
    assert torch.allclose(states[:, -1], h, atol=1e-6)
    assert torch.allclose(h_n[0], h, atol=1e-6)
    assert torch.allclose(c_n[0], c, atol=1e-6)
