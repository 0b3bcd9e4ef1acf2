"""Random detectors, rescaled so that they behave like slightly trained ones.

As initialised, they find the same object in every box. For checks and load tests the best boxes must be few and apart,
as those of a trained detector are; otherwise load tests would mostly time the suppression.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from export.arrays import Arrays
from export.graph import ServingGraph
from models.detectors import Detector, FasterRcnn, OneStage, Ssd


def settle_detector(graph: ServingGraph, inputs: Arrays) -> None:
    """Rescales the heads: outputs differ from box to box on `inputs`, and the background gets a lead."""
    with ExitStack() as hooks:
        for detector in graph.module.modules():
            if isinstance(detector, Detector):
                for layer, settled in _heads(detector):
                    hooks.enter_context(layer.register_forward_hook(settled))
        graph.reference(inputs)


def _heads(detector: Any) -> Iterator[tuple[nn.Module, _Settled]]:
    """The layers of torchvision's heads. Their deviations, and the lead of the background over objects, are such that
    some boxes of an image are above the detector's threshold, and most are not. A second stage scores overlapping boxes
    almost equally; with a larger deviation the differences would be rounding errors."""
    if isinstance(detector, Ssd):
        # More classes are more chances to be above the threshold: 18 for COCO's 90.
        lead = 9 + 2 * math.log(detector.classes)
        for layer in _last(detector.head.classification_head.module_list):
            yield layer, _Settled(2.0, lead, every=detector.classes)
        yield from ((layer, _Settled(1.0)) for layer in _last(detector.head.regression_head.module_list))
    elif isinstance(detector, OneStage):
        yield detector.head.classification_head.cls_logits, _Settled(2.0, -3 - math.log(detector.classes), every=1)
    elif isinstance(detector, FasterRcnn):
        yield detector.rpn.head.cls_logits, _Settled(2.0)
        yield (
            detector.roi_heads.box_predictor.cls_score,
            _Settled(1.0, 2.5 + math.log(detector.classes), every=detector.classes),
        )


def _last(predictors: nn.ModuleList) -> Iterator[nn.Module]:
    """SSDlite's are sequences of layers."""
    return (predictor[-1] if isinstance(predictor, nn.Sequential) else predictor for predictor in predictors)


class _Settled:
    """A forward hook that rescales a layer channel by channel: mean 0, or `lead` for each `every`th channel."""

    def __init__(self, deviation: float, lead: float = 0.0, every: int = 1) -> None:
        self.deviation = deviation
        self.lead = lead
        self.every = every

    def __call__(self, layer: nn.Conv2d | nn.Linear, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
        axes = [axis for axis in range(output.ndim) if axis != 1]
        variance, mean = torch.var_mean(output, dim=axes)
        scale = self.deviation / variance.sqrt().clamp(min=1e-6)
        lead = torch.zeros_like(mean)
        lead[:: self.every] = self.lead
        assert layer.bias is not None  # the heads have one
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias.sub_(mean).mul_(scale).add_(lead)
        along = [1, -1, *[1] * (output.ndim - 2)]
        return (output - mean.view(along)) * scale.view(along) + lead.view(along)
