"""LeNet-5 (LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998).

Differences from the paper, all common since: C3 sees all six maps of S2 (the paper's sparse table broke symmetry and
saved arithmetic); subsampling is a plain average, without a weight and a bias per map; the output is a dense layer for
a softmax, instead of distances to drawn digits.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

PADDING = 2  # 28x28 to the paper's 32x32: strokes at the edge can reach the centre of a 5x5 filter


class LeNet5(nn.Module):
    """float32 [N, 1, 28, 28], background 0 and ink 1 -> logits float32 [N, 10]. 61,706 parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, 6, kernel_size=5)
        self.s2 = nn.AvgPool2d(2)
        self.c3 = nn.Conv2d(6, 16, kernel_size=5)
        self.s4 = nn.AvgPool2d(2)
        self.c5 = nn.Conv2d(16, 120, kernel_size=5)
        self.f6 = nn.Linear(120, 84)
        self.output = nn.Linear(84, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = F.pad(image, (PADDING, PADDING, PADDING, PADDING))  # [N, 1, 32, 32]
        x = self.c1(x).tanh()  # [N, 6, 28, 28]
        x = self.s2(x)  # [N, 6, 14, 14]
        x = self.c3(x).tanh()  # [N, 16, 10, 10]
        x = self.s4(x)  # [N, 16, 5, 5]
        x = self.c5(x).tanh().flatten(1)  # [N, 120]
        x = self.f6(x).tanh()  # [N, 84]
        logits: Tensor = self.output(x)  # [N, 10]
        return logits
