"""Sizes and costs of a network, counted while it runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The module without storage: shapes and costs of the largest network in no time."""
    with torch.device("meta"):
        return build().eval()


def depth(module: nn.Module) -> int:
    """Convolutions and dense layers on the longest way from the input to the output, as papers count layers."""
    traced = fx.symbolic_trace(module)
    layers = dict(module.named_modules())
    passed: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        counts = node.op == "call_module" and isinstance(layers[str(node.target)], nn.Conv2d | nn.Linear)
        passed[node] = max((passed[before] for before in node.all_input_nodes), default=0) + counts
    return max(passed.values())


def multiply_adds(module: nn.Module, *shape: int) -> int:
    """Of all convolutions and dense layers, for one input of `shape` (without the batch)."""
    total = 0

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            kernel_height, kernel_width = layer.kernel_size
            total += output.numel() * layer.in_channels // layer.groups * kernel_height * kernel_width
        elif isinstance(layer, nn.Linear):
            total += output.numel() * layer.in_features

    hooks = [layer.register_forward_hook(count) for layer in module.modules()]
    with torch.inference_mode():
        module(torch.zeros(1, *shape, device=next(module.parameters()).device))
    for hook in hooks:
        hook.remove()
    return total


def shapes(module: nn.Module, image: Tensor) -> dict[str, tuple[int, ...]]:
    """Output shape of every submodule that gives a tensor, without the batch."""
    found: dict[str, tuple[int, ...]] = {}
    hooks = []
    for name, layer in module.named_modules():

        def note(_: nn.Module, __: tuple[Tensor, ...], output: object, name: str = name) -> None:
            if isinstance(output, Tensor):
                found[name] = tuple(output.shape[1:])

        hooks.append(layer.register_forward_hook(note))
    with torch.inference_mode():
        module(image)
    for hook in hooks:
        hook.remove()
    return found
