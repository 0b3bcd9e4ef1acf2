"""ONNX translations of the project's own operators: `models.suppression` and `models.roi_pooling`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnxscript import opset20 as op

from models.roi_pooling import pool_boxes
from models.suppression import surest

_ALL = 2**31  # boxes of a class: no limit


def translations() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """The custom translation table for `torch.onnx.export`."""
    return {surest._opoverload: _surest, pool_boxes._opoverload: _pool_boxes}


def _surest(boxes: Any, scores: Any, iou_threshold: float, score_threshold: float) -> Any:
    chosen = op.NonMaxSuppression(
        boxes, scores, _ints(_ALL), _float(iou_threshold, 1), _float(score_threshold, 1)
    )  # [K, 3]: row, class, box
    nothing = op.Mul(scores, _float(0.0))
    return op.ScatterND(nothing, chosen, op.GatherND(scores, chosen))


def _pool_boxes(
    maps: Sequence[Any], boxes: Any, level: Any, scales: Sequence[float], size: Sequence[int], samples: int
) -> Any:
    flat = op.Reshape(boxes, _ints(-1, 4))
    flat_level = op.Reshape(level, _ints(-1))
    rows = op.Shape(boxes, start=1, end=2)
    channels = op.Shape(maps[0], start=1, end=2)
    shape = op.Concat(op.Shape(flat, start=0, end=1), channels, _ints(*size), axis=0)
    pooled = op.Expand(_float(0.0), shape)
    for number, (features, scale) in enumerate(zip(maps, scales, strict=True)):
        at = op.Reshape(op.NonZero(op.Equal(flat_level, _ints(number))), _ints(-1))
        found = op.RoiAlign(
            features,
            op.Gather(flat, at, axis=0),
            op.Div(at, rows),
            mode="avg",
            coordinate_transformation_mode="output_half_pixel",
            output_height=size[0],
            output_width=size[1],
            sampling_ratio=max(0, samples),  # 0: as many as the box has pixels
            spatial_scale=scale,
        )
        pooled = op.ScatterND(pooled, op.Unsqueeze(at, _ints(1)), found)
    return pooled


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _float(value: float, axes: int = 0) -> Any:
    """A scalar, or [1]."""
    return op.Constant(value_floats=[value]) if axes else op.Constant(value_float=value)
