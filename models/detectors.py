"""Detectors by torchvision, cut down to tensors in and tensors out: no lists of images, no dictionaries.

Images come in as one batch, already sized and normalised, so torchvision's own resizing stage is left out. Both load
torchvision's COCO state dicts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, ssd300_vgg16
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from models.backbones import ResNet50Fpn

CLASSES = 91  # COCO's category numbers; 0 is the background


class Ssd300(nn.Module):
    """SSD300 on VGG-16 (Liu et al. 2016).

    float32 [N, 3, 300, 300], normalised by mean (0.48235, 0.45882, 0.40784) and deviation 1/255, ->
    boxes float32 [N, 8732, 4] as x1, y1, x2, y2 in pixels, and scores float32 [N, 8732, 91], the softmax over classes.
    Suppressing overlaps is left to the caller: every image gives the same number of rows.
    """

    anchors: Tensor

    def __init__(self) -> None:
        super().__init__()
        detector = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES)
        self.backbone, self.head, self.coder = detector.backbone, detector.head, detector.box_coder
        # The six maps of a 300x300 image; anchors depend on nothing else.
        maps = [torch.zeros(1, 1, size, size) for size in (38, 19, 10, 5, 3, 1)]
        images = ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)])
        self.register_buffer("anchors", detector.anchor_generator(images, maps)[0], persistent=False)  # [8732, 4]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.head(list(self.backbone(image).values()))
        offsets = raw["bbox_regression"]  # [N, 8732, 4]
        n, rows, _ = offsets.shape
        boxes = self.coder.decode_single(offsets.flatten(0, 1), self.anchors.repeat(n, 1)).unflatten(0, (n, rows))
        return clip_boxes_to_image(boxes, (300, 300)), raw["cls_logits"].softmax(2)


class FasterRcnn(nn.Module):
    """Faster R-CNN on ResNet-50 with a feature pyramid (Ren et al. 2015, Lin et al. 2017).

    float32 [N, 3, H, W], H and W multiples of 32 -> boxes float32 [N, 100, 4] in pixels, scores float32 [N, 100], best
    first, and labels int64 [N, 100]. Where fewer objects are found, the rest is zeros: label 0 is nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        detector = FasterRCNN(ResNet50Fpn().backbone, CLASSES)
        self.backbone, self.rpn, self.roi_heads = detector.backbone, detector.rpn, detector.roi_heads

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [(image.shape[2], image.shape[3])] * image.shape[0]
        features = self.backbone(image)
        proposals, _ = self.rpn(ImageList(image, sizes), features)
        found, _ = self.roi_heads(features, proposals, sizes)
        boxes, scores, labels = (
            torch.stack([_filled(one[key]) for one in found]) for key in ("boxes", "scores", "labels")
        )
        return boxes, scores, labels


def _filled(rows: Tensor, count: int = 100) -> Tensor:
    """[n, ...] -> [count, ...], zeros behind; the detector gives at most 100."""
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])
