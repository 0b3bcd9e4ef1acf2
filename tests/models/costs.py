"""Size and cost of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def on_meta(build: Callable[[], nn.Module]) -> Any:
    """The module without storage: gives shapes and costs at once. `Any`, because torch types attributes loosely."""
    with torch.device("meta"):
        return build().eval()


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def multiply_adds(module: nn.Module, *shape: int) -> int:
    """Of all convolutions and dense layers, for one input of `shape` (without the batch)."""
    total = 0

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d | nn.Linear):
            total += output.numel() * layer.weight[0].numel()

    for layer in module.modules():
        layer.register_forward_hook(count)
    with torch.inference_mode():
        module(torch.zeros(1, *shape, device=next(module.parameters()).device))
    return total
