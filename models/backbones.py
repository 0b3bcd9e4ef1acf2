"""Feature extractors: multi-scale maps for detectors, and an embedding for visual retrieval.

All take float32 [N, 3, H, W] of any height and width of at least 32 pixels (the embedding: 224 x 224), normalised for
their weights, and return a tuple of maps, finest first. A map of stride s has ceil(H / s) rows or, where a network
rounds down, one less. Each loads the state dict of the whole published network.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG, GoogLeNet, ResNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.resnet import Bottleneck
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops import FrozenBatchNorm2d

from models.partial_load import ignore_published


class ResNet50Backbone(ResNet):  # type: ignore[misc]  # torchvision is untyped
    """C2 to C5 of ResNet-50: 256, 512, 1024 and 2048 channels at strides 4, 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3])
        self.fc = nn.Identity()
        ignore_published(self, "fc.")

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))  # [N, 64, H/4, W/4]
        c2 = self.layer1(x)  # [N, 256, H/4, W/4]
        c3 = self.layer2(c2)  # [N, 512, H/8, W/8]
        c4 = self.layer3(c3)  # [N, 1024, H/16, W/16]
        c5 = self.layer4(c4)  # [N, 2048, H/32, W/32]
        return c2, c3, c4, c5


class ResNet50Fpn(nn.Module):
    """P2 to P6 of a feature pyramid on ResNet-50 (Lin et al. 2017): 256 channels at strides 4, 8, 16, 32 and 64.

    Loads the state dict of its detector (Faster R-CNN on COCO). Batch normalisation is frozen, with the epsilon of zero
    with which those weights were trained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
        )
        for module in self.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = 0.0
        ignore_published(self, "rpn.", "roi_heads.")

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(image).values())


class VGG16Backbone(VGG):  # type: ignore[misc]
    """conv3_3, conv4_3 and conv5_3 of VGG-16, after ReLU: 256, 512 and 512 channels at strides 4, 8 and 16."""

    def __init__(self) -> None:
        super().__init__(make_layers(cfgs["D"]), init_weights=False)
        del self.classifier
        ignore_published(self, "classifier.")

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        conv3_3 = self.features[:16](image)  # [N, 256, H/4, W/4]
        conv4_3 = self.features[16:23](conv3_3)  # [N, 512, H/8, W/8]
        conv5_3 = self.features[23:30](conv4_3)  # [N, 512, H/16, W/16]
        return conv3_3, conv4_3, conv5_3


class GoogLeNetBackbone(GoogLeNet):  # type: ignore[misc]
    """Inception 3b, 4e and 5b of GoogLeNet: 480, 832 and 1024 channels at strides 8, 16 and 32. Takes -1..1."""

    def __init__(self) -> None:
        super().__init__(aux_logits=False, transform_input=False, init_weights=False)
        del self.fc
        ignore_published(self, "aux1.", "aux2.", "fc.")

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = self.maxpool1(self.conv1(image))  # [N, 64, H/4, W/4]
        x = self.maxpool2(self.conv3(self.conv2(x)))  # [N, 192, H/8, W/8]
        b3 = self.inception3b(self.inception3a(x))  # [N, 480, H/8, W/8]
        x = self.inception4c(self.inception4b(self.inception4a(self.maxpool3(b3))))  # [N, 512, H/16, W/16]
        e4 = self.inception4e(self.inception4d(x))  # [N, 832, H/16, W/16]
        b5 = self.inception5b(self.inception5a(self.maxpool4(e4)))  # [N, 1024, H/32, W/32]
        return b3, e4, b5


class VGG16Embedding(VGG):  # type: ignore[misc]
    """fc7 of VGG-16 after ReLU, scaled to length 1: [N, 3, 224, 224] -> one output [N, 4096].

    Cosine similarity of two images is then the dot product of their embeddings.
    """

    def __init__(self) -> None:
        super().__init__(make_layers(cfgs["D"]), init_weights=False)
        del self.classifier[5:]  # the last dropout and the dense layer of the classes
        ignore_published(self, "classifier.6.")

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = self.avgpool(self.features(image)).flatten(1)  # [N, 25088]
        return (F.normalize(self.classifier(x)),)  # [N, 4096]
