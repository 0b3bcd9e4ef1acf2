"""RoIAlign over the levels of a pyramid, each box from the level of its size (Lin et al. 2017, equation 1).

The number of boxes per level depends on the image, which torch.export could only trace with guards. `pool_boxes` is a
custom operator, so that a traced graph has one node for it, which `export.operators` translates to ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_align

POOL_BOXES = "rafaga::pool_boxes"
SIZE = 7  # cells of a pooled box, each way
SAMPLES = 2  # per cell, each way
STRIDES = (4, 8, 16, 32)


def level_of(boxes: Tensor) -> Tensor:
    """float32 [..., 4] -> int64 [...], 0 for P2 to 3 for P5: a box of 224 x 224 pixels belongs to P4."""
    sides = boxes[..., 2:] - boxes[..., :2]
    scale = (sides[..., 0] * sides[..., 1]).sqrt()
    return torch.floor(2 + torch.log2(scale.clamp(min=1e-3) / 224) + 1e-6).clamp(0, 3).long()


@torch.library.custom_op(POOL_BOXES, mutates_args=())
def pool_boxes(p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, boxes: Tensor, level: Tensor) -> Tensor:
    """Maps float32 [N, C, ...], boxes float32 [N, R, 4] in pixels, level int64 [N, R] -> [N * R, C, 7, 7]."""
    rows = boxes.shape[1]
    flat = boxes.flatten(0, 1)
    pooled = flat.new_zeros(len(flat), p2.shape[1], SIZE, SIZE)
    for number, (features, stride) in enumerate(zip((p2, p3, p4, p5), STRIDES, strict=True)):
        at = torch.nonzero(level.flatten() == number).flatten()
        rois = torch.cat([(at // rows)[:, None].to(flat.dtype), flat[at]], dim=1)  # image, then corners
        pooled[at] = roi_align(features, rois, SIZE, 1 / stride, SAMPLES)
    return pooled


@pool_boxes.register_fake
def _(p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, boxes: Tensor, level: Tensor) -> Tensor:
    return p2.new_empty(boxes.shape[0] * boxes.shape[1], p2.shape[1], SIZE, SIZE)
