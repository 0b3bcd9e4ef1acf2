"""Random detectors, rescaled so that they behave like slightly trained ones.

As initialised, they find the same object in every box. For checks and load tests the best boxes must be few and apart,
as those of a trained detector are; otherwise load tests would mostly time the suppression.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from export.arrays import Arrays
from export.graph import ServingGraph
from models.detectors import CLASSES, FasterRcnn, Ssd300

# The deviation of the class logits, and the lead of the background over objects: some boxes of an image are then above
# the detector's threshold, and most are not. A second stage scores overlapping boxes almost equally; with a larger
# deviation the differences would be rounding errors.
_DEVIATION = {Ssd300: 2.0, FasterRcnn: 1.0}
_BACKGROUND = {Ssd300: 18.0, FasterRcnn: 7.0}


def settle_detector(graph: ServingGraph, inputs: Arrays) -> None:
    """Rescales the heads: outputs differ from box to box on `inputs`, and the background gets a lead."""
    with ExitStack() as hooks:
        for detector in graph.module.modules():
            if isinstance(detector, Ssd300 | FasterRcnn):
                for layer, deviation, background in _heads(detector):
                    hooks.enter_context(layer.register_forward_hook(_Settled(deviation, background)))
        graph.reference(inputs)


def _heads(detector: Ssd300 | FasterRcnn) -> Iterator[tuple[nn.Module, float, float]]:
    """Each layer with the target deviation of its outputs, and the lead of the background."""
    deviation, background = _DEVIATION[type(detector)], _BACKGROUND[type(detector)]
    if isinstance(detector, Ssd300):
        yield from ((layer, deviation, background) for layer in detector.head.classification_head.module_list)
        yield from ((layer, 1.0, 0.0) for layer in detector.head.regression_head.module_list)
    else:
        yield detector.rpn.head.cls_logits, 2.0, 0.0
        yield detector.roi_heads.box_predictor.cls_score, deviation, background


class _Settled:
    """A forward hook that rescales a layer channel by channel: mean 0, or `background` for the background."""

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
