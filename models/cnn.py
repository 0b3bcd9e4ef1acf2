"""A small convolutional network: two convolutions, two poolings, two dense layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DigitCNN(nn.Module):
    """float32 [N, 1, 28, 28], background 0 and ink 1 -> logits float32 [N, 10].

    The convolutions are "same" (padding 1), so the dense layer sees 64 maps of 7x7: 3,212,288 of the 3,241,354
    parameters are its own.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.dense = nn.Linear(64 * 7 * 7, 1024)
        self.output = nn.Linear(1024, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(image).relu(), 2)  # [N, 32, 14, 14]
        x = F.max_pool2d(self.conv2(x).relu(), 2)  # [N, 64, 7, 7]
        x = self.dense(x.flatten(1)).relu()  # [N, 1024]
        logits: Tensor = self.output(x)  # [N, 10]
        return logits
