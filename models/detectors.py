"""Torchvision's detectors with tensors as inputs and outputs: no lists of images, no dictionaries.

Images arrive as one batch, already resized and normalised, so torchvision's resizing is left out. All code after the
heads processes whole batches and returns the same number of rows for every image; the values are torchvision's. Each
class takes a detector of torchvision's, with any backbone, and shares its parts, thresholds and the keys of its state
dict.

    float32 [N, C, H, W], normalised -> boxes float32 [N, max_objects, 4] as x1, y1, x2, y2 in pixels, scores float32
    [N, max_objects], best first, and labels int64 [N, max_objects]. Where fewer objects are found, the rest is zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet, ssd300_vgg16
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from models.backbones import ResNet50Fpn
from models.roi_pooling import level_of, pool_boxes, scale_of
from models.suppression import best_objects, surest, take_rows

CLASSES = 91  # COCO's category numbers; 0 is the background
Objects = tuple[Tensor, Tensor, Tensor]

_MAP_SIDE = 256  # of an image whose maps show the strides


class DetectorInvalid(Exception):
    """A detector that cannot be taken; the message says why, and what to do."""


class Detector(nn.Module):
    """`original`: torchvision's module; not a submodule, because its parts are. `classes`: the number of labels, with
    the background if it has one."""

    classes: int
    cells: list[Tensor]  # anchors around the origin, of each map

    def __init__(self, detector: Any, thresholds: Any) -> None:
        super().__init__()
        self.original = (detector.eval(),)
        self.backbone = detector.backbone
        self.score_threshold = float(thresholds.score_thresh)
        self.iou_threshold = float(thresholds.nms_thresh)
        self.max_objects = int(thresholds.detections_per_img)
        self.divisible = int(detector.transform.size_divisible)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        found = self.backbone(image)
        return {"0": found} if isinstance(found, Tensor) else dict(found)

    def padded(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """`image` with sides that every stride divides, and the corners that bound its boxes, float32 [4]."""
        height, width = image.shape[2:]
        limit = torch.stack([_number(side, image) for side in (width, height, width, height)])
        return F.pad(image, (0, -width % self.divisible, 0, -height % self.divisible)), limit

    def keep_cells(self, generator: Any) -> None:
        if type(generator) is not AnchorGenerator:
            raise DetectorInvalid(f"anchors of {_named(generator)}; expected torchvision's AnchorGenerator")
        self.cells = list(generator.cell_anchors)

    def anchors(self, level: int, features: Tensor, padded: Tensor) -> Tensor:
        """[rows * columns * K, 4] of a map [N, C, rows, columns] with K anchors in each cell"""
        rows, columns = features.shape[2:]
        y = torch.arange(rows, dtype=features.dtype) * (padded.shape[2] // rows)
        x = torch.arange(columns, dtype=features.dtype) * (padded.shape[3] // columns)
        y, x = y[:, None].expand(rows, columns), x[None].expand(rows, columns)
        return (torch.stack([x, y, x, y], -1)[:, :, None] + self.cells[level]).reshape(-1, 4)


class Ssd(Detector):
    """SSD (Liu et al. 2016) and SSDlite, for images of their one size."""

    corners: Tensor
    boxes: Tensor

    def __init__(self, detector: SSD) -> None:
        super().__init__(detector, detector)
        self.head, self.coder = detector.head, detector.box_coder
        width, height = detector.transform.fixed_size
        image = torch.zeros(1, len(detector.transform.image_mean), height, width)
        with torch.no_grad():
            maps = list(self.maps(image).values())
            self.classes = self.head(maps)["cls_logits"].shape[2]
            boxes = detector.anchor_generator(ImageList(image, [(height, width)]), maps)[0]
        self.candidates = min(detector.topk_candidates, len(boxes))  # of each class, before overlaps are suppressed
        self.max_objects = min(self.max_objects, (self.classes - 1) * self.candidates)
        self.register_buffer("boxes", boxes, persistent=False)  # [B, 4]
        self.register_buffer("corners", torch.tensor([width, height] * 2, dtype=torch.float32), persistent=False)

    def forward(self, image: Tensor) -> Objects:
        boxes, scores = self.every_box(image)
        best, at = scores[..., 1:].transpose(1, 2).topk(self.candidates)  # [N, classes - 1, candidates]
        chosen = take_rows(boxes, at.flatten(1)).reshape(*best.shape, 4)
        kept = surest(chosen.flatten(0, 1), best.flatten(0, 1)[:, None], self.iou_threshold, self.score_threshold)
        return best_objects(chosen, kept.reshape(best.shape), self.max_objects)

    def every_box(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """boxes float32 [N, B, 4], and scores float32 [N, B, classes], the softmax over classes"""
        raw = self.head(list(self.maps(image).values()))
        offsets = raw["bbox_regression"]  # [N, B, 4]
        n, rows, _ = offsets.shape
        boxes = self.coder.decode_single(offsets.flatten(0, 1), self.boxes.repeat(n, 1)).reshape(n, rows, 4)
        return torch.minimum(boxes.clamp(min=0), self.corners), raw["cls_logits"].softmax(2)


class OneStage(Detector):
    """RetinaNet (Lin et al. 2017) and FCOS (Tian et al. 2019), for images of any size. No class is the background."""

    def __init__(self, detector: RetinaNet | FCOS) -> None:
        super().__init__(detector, detector)
        self.head, self.coder = detector.head, detector.box_coder
        self.keep_cells(detector.anchor_generator)
        self.candidates = int(detector.topk_candidates)  # of each map, all classes together
        self.max_objects = min(self.max_objects, len(self.cells) * self.candidates)
        image = torch.zeros(1, len(detector.transform.image_mean), _MAP_SIDE, _MAP_SIDE)
        with torch.no_grad():
            self.classes = self.head(list(self.maps(image).values()))["cls_logits"].shape[2]

    def forward(self, image: Tensor) -> Objects:
        padded, limit = self.padded(image)
        maps = list(self.maps(padded).values())
        raw = self.head(maps)  # of all maps together: [N, R, ...]
        scores, start = self.scores(raw), 0
        boxes, best, labels = [], [], []
        for level, features in enumerate(maps):
            anchors = self.anchors(level, features, padded)
            count = anchors.shape[0]  # len() would make it a constant of the traced graph
            rows, start = slice(start, start + count), start + count
            # A small map has fewer boxes than candidates: the rest is filled with scores that never win.
            top, at = F.pad(scores[:, rows].flatten(1), (0, self.candidates)).topk(self.candidates)
            row = (at // self.classes).clamp(max=count - 1)  # [N, candidates]
            offsets = take_rows(raw["bbox_regression"][:, rows], row)
            boxes.append(self.decoded(offsets.reshape(-1, 4), anchors[row].reshape(-1, 4)).reshape(offsets.shape))
            best.append(top)
            labels.append(at % self.classes)
        every = torch.minimum(torch.cat(boxes, 1).clamp(min=0), limit)  # [N, B, 4]
        label = torch.cat(labels, 1)  # [N, B]
        of_class = label[:, None] == torch.arange(self.classes)[:, None]  # [N, classes, B]
        kept = surest(every, torch.cat(best, 1)[:, None] * of_class, self.iou_threshold, self.score_threshold)
        score, at = kept.sum(1).topk(self.max_objects)
        found = score > 0
        return take_rows(every, at) * found[..., None], score, label.gather(1, at) * found

    def scores(self, raw: dict[str, Tensor]) -> Tensor:
        """[N, R, classes]"""
        scores = raw["cls_logits"].sigmoid()
        return (scores * raw["bbox_ctrness"].sigmoid()).sqrt() if "bbox_ctrness" in raw else scores

    def decoded(self, offsets: Tensor, anchors: Tensor) -> Tensor:
        decode = getattr(self.coder, "decode_single", self.coder.decode)
        boxes: Tensor = decode(offsets, anchors)
        return boxes


class FasterRcnn(Detector):
    """Faster R-CNN (Ren et al. 2015), with or without a feature pyramid (Lin et al. 2017), for images of any size."""

    def __init__(self, detector: FasterRCNN) -> None:
        super().__init__(detector, detector.roi_heads)
        if detector.roi_heads.has_mask() or detector.roi_heads.has_keypoint():
            raise DetectorInvalid("it also gives masks or keypoints, which are not served: give a FasterRCNN")
        self.rpn, self.roi_heads = detector.rpn, detector.roi_heads
        self.keep_cells(self.rpn.anchor_generator)
        self.candidates = int(self.rpn._pre_nms_top_n["testing"])  # of each map before overlaps are suppressed
        self.proposals = min(int(self.rpn._post_nms_top_n["testing"]), len(self.cells) * self.candidates)
        pool = self.roi_heads.box_roi_pool
        self.pooled = tuple(pool.featmap_names)
        image = torch.zeros(1, len(detector.transform.image_mean), _MAP_SIDE, _MAP_SIDE)
        with torch.no_grad():
            maps = self.maps(image)
            self.scales = [scale_of(maps[name], _MAP_SIDE) for name in self.pooled]
            box = torch.zeros(1, maps[self.pooled[0]].shape[1], *pool.output_size)
            self.classes = self.roi_heads.box_predictor(self.roi_heads.box_head(box))[0].shape[1]
        self.max_objects = min(self.max_objects, (self.classes - 1) * self.proposals)

    def forward(self, image: Tensor) -> Objects:
        padded, limit = self.padded(image)
        maps = self.maps(padded)
        proposals, real = self.propose(list(maps.values()), padded, limit)
        return self.classify([maps[name] for name in self.pooled], proposals, real, limit)

    def propose(self, maps: list[Tensor], padded: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """Proposed boxes float32 [N, proposals, 4], and bool [N, proposals]: False for rows that only fill up."""
        objectness, offsets = self.rpn.head(maps)
        boxes, scores = [], []
        for level, (logits, offset) in enumerate(zip(objectness, offsets, strict=True)):
            n, each, rows, columns = logits.shape
            anchors = self.anchors(level, logits, padded)  # [rows * columns * each, 4]
            sureness = logits.permute(0, 2, 3, 1).flatten(1)  # [N, rows * columns * each]
            regression = offset.reshape(n, each, 4, rows, columns).permute(0, 3, 4, 1, 2).reshape(n, -1, 4)
            # A small map has fewer anchors than candidates: the rest is filled with scores that never win.
            best, at = F.pad(sureness, (0, self.candidates), value=-1e4).topk(self.candidates)
            at = at.clamp(max=sureness.shape[1] - 1)
            chosen = take_rows(regression, at).reshape(-1, 4)
            boxes.append(self.rpn.box_coder.decode_single(chosen, anchors[at].reshape(-1, 4)).reshape(n, -1, 4))
            scores.append(best.sigmoid())
        decoded = torch.minimum(torch.stack(boxes, 1).clamp(min=0), limit)  # [N, maps, candidates, 4]
        sure = torch.stack(scores, 1) * _larger_than(decoded, 1e-3)  # [N, maps, candidates]
        kept = surest(
            decoded.flatten(0, 1), sure.flatten(0, 1)[:, None], float(self.rpn.nms_thresh), float(self.rpn.score_thresh)
        )
        best, at = kept.reshape(sure.shape).flatten(1).topk(self.proposals)
        return take_rows(decoded.flatten(1, 2), at), best > 0

    def classify(self, maps: Sequence[Tensor], proposals: Tensor, real: Tensor, limit: Tensor) -> Objects:
        """Classes of the proposals, with refined boxes of each class."""
        n, rows = real.shape
        pool = self.roi_heads.box_roi_pool
        level = level_of(proposals, self.scales, pool.canonical_scale, pool.canonical_level)
        pooled = pool_boxes(maps, proposals, level, self.scales, list(pool.output_size), int(pool.sampling_ratio))
        logits, offsets = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        scores = (logits.softmax(1).reshape(n, rows, self.classes) * real[..., None])[..., 1:]
        decoded = self.roi_heads.box_coder.decode_single(offsets, proposals.reshape(-1, 4))
        boxes = torch.minimum(decoded.reshape(n, rows, self.classes, 4)[:, :, 1:].clamp(min=0), limit)
        boxes, scores = boxes.transpose(1, 2), scores.transpose(1, 2)  # [N, classes - 1, rows, 4], without the 4
        scores = scores * _larger_than(boxes, 1e-2)
        kept = surest(boxes.flatten(0, 1), scores.flatten(0, 1)[:, None], self.iou_threshold, self.score_threshold)
        return best_objects(boxes, kept.reshape(scores.shape), self.max_objects)


_FAMILIES: dict[type, Callable[[Any], Detector]] = {
    SSD: Ssd,
    RetinaNet: OneStage,
    FCOS: OneStage,
    FasterRCNN: FasterRcnn,
}


def batched(detector: nn.Module) -> Detector:
    """One of torchvision's detectors, or of a subclass. Raises DetectorInvalid."""
    ours = next((ours for theirs, ours in _FAMILIES.items() if isinstance(detector, theirs)), None)
    if ours is None:
        families = ", ".join(family.__name__ for family in _FAMILIES)
        raise DetectorInvalid(
            f"{_named(detector)} is none of torchvision's {families}; serve other detectors as plain ONNX, or write an "
            f"entry in models/zoo.py whose module gives boxes, scores and labels"
        )
    if type(detector.transform) is not GeneralizedRCNNTransform:
        raise DetectorInvalid(
            f"images prepared by {_named(detector.transform)}; expected torchvision's GeneralizedRCNNTransform"
        )
    return ours(detector)


def ssd300() -> Detector:
    """On VGG-16, for COCO. Takes 300 x 300 pixels, normalised by mean (0.48235, 0.45882, 0.40784), deviation 1/255."""
    return batched(ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES))


def faster_rcnn() -> Detector:
    """On ResNet-50 with a feature pyramid, for COCO."""
    return batched(FasterRCNN(ResNet50Fpn().backbone, CLASSES))


def _larger_than(boxes: Tensor, pixels: float) -> Tensor:
    """[..., 4] -> bool [...]: width and height are at least `pixels`"""
    return ((boxes[..., 2:] - boxes[..., :2]) >= pixels).all(-1)


def _number(side: int, like: Tensor) -> Tensor:
    """A size as a tensor that a traced graph computes from its input; `torch.tensor` would make it a constant."""
    return torch.scalar_tensor(side, dtype=like.dtype)


def _named(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
