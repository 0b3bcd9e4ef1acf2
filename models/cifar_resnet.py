"""The CIFAR-10 networks of He, Zhang, Ren, Sun: Deep residual learning for image recognition (2016), section 4.2.

6n + 2 layers: a convolution, three stages of n blocks of two 3x3 convolutions on maps of 32, 16 and 8 pixels with 16,
32 and 64 filters, and a dense layer. The plain networks are the same without shortcuts, for comparison: they get worse
with depth, and residual ones do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class CifarConfig:
    depth: int  # 20, 32, 44, 56, 110: 6n + 2
    residual: bool
    classes: int = 10


class Block(nn.Module):
    """Two 3x3 convolutions. The shortcut has no parameters: where the shape changes it takes every other pixel and adds
    channels of zeros (option A of the paper)."""

    def __init__(self, inputs: int, outputs: int, stride: int, residual: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.added = outputs - inputs
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu() if self.residual else y.relu()

    def shortcut(self, x: Tensor) -> Tensor:
        if self.added == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added // 2, self.added // 2))


class CifarResNet(nn.Module):
    """float32 [N, 3, 32, 32] -> logits float32 [N, classes]. Depth 20 has 269,722 parameters, 56 has 853,018."""

    def __init__(self, config: CifarConfig) -> None:
        super().__init__()
        blocks, rest = divmod(config.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 with n of at least 1, not {config.depth}")
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.stage1 = _stage(16, 16, 1, blocks, config.residual)
        self.stage2 = _stage(16, 32, 2, blocks, config.residual)
        self.stage3 = _stage(32, 64, 2, blocks, config.residual)
        self.output = nn.Linear(64, config.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, image: Tensor) -> Tensor:
        x = self.bn(self.conv(image)).relu()  # [N, 16, 32, 32]
        x = self.stage1(x)  # [N, 16, 32, 32]
        x = self.stage2(x)  # [N, 32, 16, 16]
        x = self.stage3(x)  # [N, 64, 8, 8]
        logits: Tensor = self.output(x.mean((2, 3)))  # [N, classes]
        return logits


def _stage(inputs: int, outputs: int, stride: int, blocks: int, residual: bool) -> nn.Sequential:
    first = Block(inputs, outputs, stride, residual)
    return nn.Sequential(first, *(Block(outputs, outputs, 1, residual) for _ in range(blocks - 1)))
