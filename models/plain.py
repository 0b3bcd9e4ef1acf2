"""Plain-34 (He et al. 2016, figure 3 and table 1): ResNet-34 without shortcuts. No weights are published."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import ResNet


class PlainBlock(nn.Module):
    """Two 3x3 convolutions; a residual block would add its input to the result."""

    expansion = 1

    # The signature that torchvision's ResNet requires; `downsample` belongs to the shortcut and is ignored.
    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: type[nn.BatchNorm2d] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm_layer(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = norm_layer(planes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        y: Tensor = self.bn2(self.conv2(x)).relu()
        return y


def plain34() -> nn.Module:
    """float32 [N, 3, 224, 224] -> logits float32 [N, 1000]"""
    module: nn.Module = ResNet(PlainBlock, [3, 4, 6, 3])
    return module
