"""Torchvision's detectors with tensors as inputs and outputs: no lists of images, no dictionaries.

Images arrive as one batch, already resized and normalised, so torchvision's resizing is left out. All code after the
heads processes whole batches and returns the same number of rows for every image; the values are torchvision's. Both
load torchvision's COCO state dicts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, ssd300_vgg16
from torchvision.models.detection.image_list import ImageList

from models.backbones import ResNet50Fpn
from models.roi_pooling import level_of, pool_boxes
from models.suppression import best_objects, surest, take_rows

CLASSES = 91  # COCO's category numbers; 0 is the background
Objects = tuple[Tensor, Tensor, Tensor]


class Ssd300(nn.Module):
    """SSD300 on VGG-16 (Liu et al. 2016).

    float32 [N, 3, 300, 300], normalised by mean (0.48235, 0.45882, 0.40784) and deviation 1/255, -> boxes float32
    [N, 200, 4] as x1, y1, x2, y2 in pixels, scores float32 [N, 200], best first, and labels int64 [N, 200]. Where fewer
    objects are found, the rest is zeros: label 0 means no object.
    """

    max_objects = 200
    score_threshold = 0.01
    iou_threshold = 0.45
    candidates = 400  # of each class, before overlaps are suppressed

    anchors: Tensor

    def __init__(self) -> None:
        super().__init__()
        detector = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES)
        self.backbone, self.head, self.coder = detector.backbone, detector.head, detector.box_coder
        # Anchors depend only on the sizes of the six maps of a 300x300 image.
        maps = [torch.zeros(1, 1, size, size) for size in (38, 19, 10, 5, 3, 1)]
        images = ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)])
        self.register_buffer("anchors", detector.anchor_generator(images, maps)[0], persistent=False)  # [8732, 4]

    def forward(self, image: Tensor) -> Objects:
        boxes, scores = self.every_box(image)
        best, at = scores[..., 1:].transpose(1, 2).topk(self.candidates)  # [N, 90, 400]
        chosen = take_rows(boxes, at.flatten(1))  # [N, 90 * 400, 4]
        kept = surest(
            chosen.reshape(-1, self.candidates, 4), best.flatten(0, 1), self.iou_threshold, self.score_threshold
        )
        return best_objects(chosen.reshape(*best.shape, 4), kept.reshape(best.shape), self.max_objects)

    def every_box(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """boxes float32 [N, 8732, 4], and scores float32 [N, 8732, 91], the softmax over classes"""
        raw = self.head(list(self.backbone(image).values()))
        offsets = raw["bbox_regression"]  # [N, 8732, 4]
        n, rows, _ = offsets.shape
        boxes = self.coder.decode_single(offsets.flatten(0, 1), self.anchors.repeat(n, 1)).reshape(n, rows, 4)
        return boxes.clamp(0, 300), raw["cls_logits"].softmax(2)


class FasterRcnn(nn.Module):
    """Faster R-CNN on ResNet-50 with a feature pyramid (Ren et al. 2015, Lin et al. 2017).

    float32 [N, 3, H, W] of any height and width -> boxes float32 [N, 100, 4] in pixels, scores float32 [N, 100], best
    first, and labels int64 [N, 100]. Where fewer objects are found, the rest is zeros: label 0 means no object.
    """

    max_objects = 100
    score_threshold = 0.05
    iou_threshold = 0.5
    proposals = 1000  # of each level before overlaps are suppressed, and of all levels after
    proposal_iou_threshold = 0.7

    cells: Tensor

    def __init__(self) -> None:
        super().__init__()
        detector = FasterRCNN(ResNet50Fpn().backbone, CLASSES)
        self.backbone, self.rpn, self.roi_heads = detector.backbone, detector.rpn, detector.roi_heads
        # Anchors around the origin: three of each of the five levels.
        self.register_buffer("cells", torch.stack(detector.rpn.anchor_generator.cell_anchors), persistent=False)

    def forward(self, image: Tensor) -> Objects:
        height, width = image.shape[2:]
        padded = F.pad(image, (0, -width % 32, 0, -height % 32))
        limit = torch.stack([_number(side, image) for side in (width, height, width, height)])
        maps = list(self.backbone(padded).values())  # P2 to P6, 256 channels each
        proposals, real = self.propose(maps, (padded.shape[2], padded.shape[3]), limit)
        return self.classify(maps, proposals, real, limit)

    def propose(self, maps: list[Tensor], size: tuple[int, int], limit: Tensor) -> tuple[Tensor, Tensor]:
        """Proposed boxes float32 [N, 1000, 4], and bool [N, 1000]: False for rows that only fill up."""
        objectness, offsets = self.rpn.head(maps)
        boxes, scores = [], []
        for level, (logits, offset) in enumerate(zip(objectness, offsets, strict=True)):
            n, _, rows, columns = logits.shape
            anchors = _anchors(self.cells[level], rows, columns, size)  # [rows * columns * 3, 4]
            sureness = logits.permute(0, 2, 3, 1).flatten(1)  # [N, rows * columns * 3]
            regression = offset.reshape(n, 3, 4, rows, columns).permute(0, 3, 4, 1, 2).reshape(n, -1, 4)
            # A small map has fewer anchors than proposals: the rest is filled with scores that never win.
            best, at = F.pad(sureness, (0, self.proposals), value=-1e4).topk(self.proposals)  # [N, 1000]
            at = at.clamp(max=sureness.shape[1] - 1)
            chosen = take_rows(regression, at).reshape(-1, 4)
            boxes.append(self.rpn.box_coder.decode_single(chosen, anchors[at].reshape(-1, 4)).reshape(n, -1, 4))
            scores.append(best.sigmoid())
        decoded = torch.minimum(torch.stack(boxes, 1).clamp(min=0), limit)  # [N, 5, 1000, 4]
        sure = torch.stack(scores, 1) * _larger_than(decoded, 1e-3)  # [N, 5, 1000]
        kept = surest(decoded.flatten(0, 1), sure.flatten(0, 1), self.proposal_iou_threshold, 0.0)
        best, at = kept.reshape(sure.shape).flatten(1).topk(self.proposals)
        return take_rows(decoded.flatten(1, 2), at), best > 0

    def classify(self, maps: list[Tensor], proposals: Tensor, real: Tensor, limit: Tensor) -> Objects:
        """Classes of the proposals, with refined boxes of each class."""
        n, rows = real.shape
        pooled = pool_boxes(*maps[:4], proposals, level_of(proposals))  # [N * 1000, 256, 7, 7]
        logits, offsets = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        scores = (logits.softmax(1).reshape(n, rows, CLASSES) * real[..., None])[..., 1:]  # [N, 1000, 90]
        decoded = self.roi_heads.box_coder.decode_single(offsets, proposals.reshape(-1, 4))
        boxes = torch.minimum(decoded.reshape(n, rows, CLASSES, 4)[:, :, 1:].clamp(min=0), limit)
        boxes, scores = boxes.transpose(1, 2), scores.transpose(1, 2)  # [N, 90, 1000, 4], [N, 90, 1000]
        scores = scores * _larger_than(boxes, 1e-2)
        kept = surest(boxes.flatten(0, 1), scores.flatten(0, 1), self.iou_threshold, self.score_threshold)
        return best_objects(boxes, kept.reshape(scores.shape), self.max_objects)


def _anchors(cells: Tensor, rows: int, columns: int, size: tuple[int, int]) -> Tensor:
    """cells [3, 4] moved to every cell of a map [rows, columns] of an image of `size`: [rows * columns * 3, 4]"""
    y = torch.arange(rows, dtype=cells.dtype) * (size[0] // rows)
    x = torch.arange(columns, dtype=cells.dtype) * (size[1] // columns)
    y, x = y[:, None].expand(rows, columns), x[None].expand(rows, columns)
    return (torch.stack([x, y, x, y], -1)[:, :, None] + cells).reshape(-1, 4)


def _larger_than(boxes: Tensor, pixels: float) -> Tensor:
    """[..., 4] -> bool [...]: width and height are at least `pixels`"""
    return ((boxes[..., 2:] - boxes[..., :2]) >= pixels).all(-1)


def _number(side: int, like: Tensor) -> Tensor:
    """A size as a tensor that a traced graph computes from its input; `torch.tensor` would make it a constant."""
    return torch.scalar_tensor(side, dtype=like.dtype)
