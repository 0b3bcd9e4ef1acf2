"""Fully convolutional segmentation (Long, Shelhamer, Darrell 2015) on a dilated ResNet-50, by torchvision."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.segmentation import fcn_resnet50

from models.partial_load import ignore_published


class FcnResNet50(nn.Module):
    """float32 [N, 3, H, W] -> one map of class scores float32 [N, 21, H, W]; channel 0 is the background.

    Loads torchvision's state dict; the auxiliary head is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        network = fcn_resnet50(weights=None, weights_backbone=None, aux_loss=False)
        self.backbone, self.classifier = network.backbone, network.classifier
        ignore_published(self, "aux_classifier.")

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        scores = self.classifier(self.backbone(image)["out"])  # [N, 21, H/8, W/8]
        return (nn.functional.interpolate(scores, size=image.shape[-2:], mode="bilinear", align_corners=False),)
