"""Random parameters, brought to where a little training would bring them.

For proofs and load tests of networks that nobody has trained. As they are initialised, deep ones answer every image
with the same class at probability 1, and detectors see an object in every box.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from export.arrays import Arrays
from export.graph import ServingGraph
from models.detectors import CLASSES, FasterRcnn, Ssd300

# How large the scores of classes are made, as a deviation of logits, and how much likelier than an object the
# background is: some boxes of an image are then surer than the detector's threshold, and most are not. What a second
# stage says of boxes that overlap differs little; stretched further, the differences would be rounding errors.
_DEVIATION = {Ssd300: 2.0, FasterRcnn: 1.0}
_BACKGROUND = {Ssd300: 18.0, FasterRcnn: 7.0}


def settle(graph: ServingGraph, inputs: Arrays) -> None:
    """Gives normalisations, and the heads of detectors, the statistics of `inputs`."""
    _settle_batch_norm(graph, inputs)
    detectors = [module for module in graph.module.modules() if isinstance(module, Ssd300 | FasterRcnn)]
    with ExitStack() as hooks:
        for module in graph.module.modules():
            if isinstance(module, FrozenBatchNorm2d):
                hooks.enter_context(module.register_forward_pre_hook(_measure))
        for detector in detectors:
            for layer, deviation, background in _heads(detector):
                hooks.enter_context(layer.register_forward_hook(_Settled(deviation, background)))
        graph.reference(inputs)


def _settle_batch_norm(graph: ServingGraph, inputs: Arrays) -> None:
    """As one pass of training would: with the initial mean 0 and variance 1 nothing is normalised, and activations grow
    from layer to layer."""
    norms = [module for module in graph.module.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over what it sees
        norm.train()
    graph.reference(inputs)
    graph.module.eval()


def _measure(norm: FrozenBatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
    variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance + 1e-5)


def _heads(detector: Ssd300 | FasterRcnn) -> Iterator[tuple[nn.Module, float, float]]:
    """Each layer with the deviation that its outputs shall have, and the lead of the background."""
    deviation, background = _DEVIATION[type(detector)], _BACKGROUND[type(detector)]
    if isinstance(detector, Ssd300):
        yield from ((layer, deviation, background) for layer in detector.head.classification_head.module_list)
        yield from ((layer, 1.0, 0.0) for layer in detector.head.regression_head.module_list)
    else:
        yield detector.rpn.head.cls_logits, 2.0, 0.0
        yield detector.roi_heads.box_predictor.cls_score, deviation, background


class _Settled:
    """A forward hook that rescales a layer channel by channel, to mean 0 but for the background."""

    def __init__(self, deviation: float, background: float) -> None:
        self.deviation = deviation
        self.background = background

    def __call__(self, layer: nn.Conv2d | nn.Linear, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
        axes = [axis for axis in range(output.ndim) if axis != 1]
        variance, mean = torch.var_mean(output, dim=axes)
        scale = self.deviation / variance.sqrt().clamp(min=1e-6)
        lead = torch.zeros_like(mean)
        lead[::CLASSES] = self.background
        assert layer.bias is not None  # the heads have one
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias.sub_(mean).mul_(scale).add_(lead)
        along = [1, -1, *[1] * (output.ndim - 2)]
        return (output - mean.view(along)) * scale.view(along) + lead.view(along)
