"""GoogLeNet (Szegedy et al.: Going deeper with convolutions, 2015) as torchvision builds it, and the naive module.

torchvision's differs from the paper in two ways, which its weights require: batch normalisation after every
convolution, and a 3x3 convolution in the branch that is 5x5 in the paper (`branch3`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import GoogLeNet

from models.partial_load import ignore_published


class GoogLeNetClassifier(GoogLeNet):  # type: ignore[misc]  # torchvision is untyped
    """float32 [N, 3, 224, 224] in -1..1 -> logits float32 [N, 1000].

    Without the two auxiliary heads, which are used in training only. torchvision's version takes ImageNet's
    normalisation and converts it to -1..1 inside (`transform_input`).
    """

    def __init__(self) -> None:
        super().__init__(aux_logits=False, transform_input=False, init_weights=False)
        ignore_published(self, "aux1.", "aux2.")


class NaiveInception(nn.Module):
    """The module that the paper starts from (figure 2a): 1x1, 3x3 and 5x5 convolutions and a pooling in parallel.

    [N, inputs, H, W] -> [N, ones + threes + fives + inputs, H, W]. The pooling passes all its input channels on, so
    width can only grow, and without 1x1 reductions the 5x5 branch costs most of the arithmetic.
    """

    def __init__(self, inputs: int, ones: int, threes: int, fives: int) -> None:
        super().__init__()
        self.ones = nn.Conv2d(inputs, ones, 1)
        self.threes = nn.Conv2d(inputs, threes, 3, padding=1)
        self.fives = nn.Conv2d(inputs, fives, 5, padding=2)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.ones(x).relu(), self.threes(x).relu(), self.fives(x).relu(), self.pool(x)], dim=1)
