"""RoIAlign over the levels of a pyramid, each box from the level of its size (Lin et al. 2017, equation 1).

The number of boxes per level depends on the image, which torch.export could only trace with guards. `pool_boxes` is a
custom operator, so that a traced graph has one node for it, which `export.operators` translates to ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

POOL_BOXES = "rafaga::pool_boxes"


def scale_of(features: Tensor, side: int) -> float:
    """Of a map [N, C, H, W] to an image of `side` pixels: a power of two, as torchvision assumes."""
    return float(2.0 ** round(math.log2(features.shape[2] / side)))


def level_of(boxes: Tensor, scales: Sequence[float], canonical_scale: int, canonical_level: int) -> Tensor:
    """float32 [..., 4] -> int64 [...]: a box of `canonical_scale` pixels each way belongs to the map whose scale is
    2 ** -canonical_level. Maps have the `scales`, and the numbers 0, 1, 2 …"""
    first, last = (round(-math.log2(scale)) for scale in (scales[0], scales[-1]))
    sides = boxes[..., 2:] - boxes[..., :2]
    size = (sides[..., 0] * sides[..., 1]).sqrt()
    level = torch.floor(canonical_level + torch.log2(size.clamp(min=1e-3) / canonical_scale) + 1e-6)
    return level.clamp(first, last).long() - first


@torch.library.custom_op(POOL_BOXES, mutates_args=())
def pool_boxes(
    maps: Sequence[Tensor], boxes: Tensor, level: Tensor, scales: Sequence[float], size: Sequence[int], samples: int
) -> Tensor:
    """Maps float32 [N, C, ...] of the `scales`, boxes float32 [N, R, 4] in pixels, level int64 [N, R] -> [N * R, C,
    *size]. `samples`: points per cell, each way."""
    rows = boxes.shape[1]
    flat = boxes.flatten(0, 1)
    pooled = flat.new_zeros(len(flat), maps[0].shape[1], *size)
    for number, (features, scale) in enumerate(zip(maps, scales, strict=True)):
        at = torch.nonzero(level.flatten() == number).flatten()
        rois = torch.cat([(at // rows)[:, None].to(flat.dtype), flat[at]], dim=1)  # image, then corners
        pooled[at] = roi_align(features, rois, list(size), scale, samples)
    return pooled


@pool_boxes.register_fake
def _(
    maps: Sequence[Tensor], boxes: Tensor, level: Tensor, scales: Sequence[float], size: Sequence[int], samples: int
) -> Tensor:
    return boxes.new_empty(boxes.shape[0] * boxes.shape[1], maps[0].shape[1], *size)
