"""Non-maximum suppression over a whole batch, with as many rows out as in: what makes a detector batchable.

torchvision suppresses image by image and gives as many boxes as are left, which no graph with a batch axis can say.
Here what is suppressed keeps its place and gets the score zero. `surest` is an operator of its own, so that a traced
graph has one node for it: `export.operators` writes that node as ONNX's NonMaxSuppression.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

SUREST = "rafaga::surest"


@torch.library.custom_op(SUREST, mutates_args=())
def surest(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> Tensor:
    """boxes float32 [M, B, 4] as corners, scores float32 [M, B] -> scores [M, B] with zeros for what is not given.

    Of each row alone: boxes not surer than `score_threshold`, and those that overlap a surer one by more than
    `iou_threshold` (intersection over union).
    """
    kept = torch.zeros_like(scores)
    for row in torch.nonzero((scores > score_threshold).any(dim=1)).flatten().tolist():
        above = torch.nonzero(scores[row] > score_threshold).flatten()
        left = above[nms(boxes[row, above], scores[row, above], iou_threshold)]
        kept[row, left] = scores[row, left]
    return kept


@surest.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> Tensor:
    return torch.empty_like(scores)


def best_objects(boxes: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The surest of all classes, best first, zeros where there are fewer.

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
