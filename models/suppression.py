"""Non-maximum suppression over a whole batch, with as many output rows as input rows, so that detectors can batch.

torchvision suppresses image by image and returns a different number of boxes for each, which a graph with a batch axis
cannot express. Here a suppressed box stays and gets the score zero. `surest` is a custom operator, so that a traced
graph has one node for it, which `export.operators` translates to ONNX's NonMaxSuppression.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

SUREST = "rafaga::surest"


@torch.library.custom_op(SUREST, mutates_args=())
def surest(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> Tensor:
    """boxes float32 [M, B, 4] as corners, scores float32 [M, C, B] of C classes -> scores, zero where suppressed.

    Each row and class separately: suppresses boxes with scores up to `score_threshold`, and boxes that overlap one with
    a higher score by more than `iou_threshold` (intersection over union).
    """
    kept = torch.zeros_like(scores)
    for row, of_class in torch.nonzero((scores > score_threshold).any(dim=2)).tolist():
        sure = scores[row, of_class]
        above = torch.nonzero(sure > score_threshold).flatten()
        left = above[nms(boxes[row, above], sure[above], iou_threshold)]
        kept[row, of_class, left] = sure[left]
    return kept


@surest.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> Tensor:
    return torch.empty_like(scores)


def best_objects(boxes: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The objects with the highest scores of all classes, best first; zeros if there are fewer.

    boxes float32 [N, C, B, 4] and scores float32 [N, C, B] of the classes 1 to C -> boxes [N, count, 4], scores
    [N, count], labels int64 [N, count].
    """
    best, at = scores.flatten(1).topk(count)  # [N, count]
    labels = at // scores.shape[2] + 1
    found = best > 0
    return take_rows(boxes.flatten(1, 2), at) * found[..., None], best, labels * found


def take_rows(rows: Tensor, at: Tensor) -> Tensor:
    """[N, B, F], int64 [N, K] -> [N, K, F]"""
    return rows.gather(1, at[..., None].expand(-1, -1, rows.shape[2]))
