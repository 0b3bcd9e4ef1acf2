"""ONNX translations of the project's own operators: `models.suppression` and `models.roi_pooling`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from onnxscript import opset20 as op

from models.roi_pooling import SAMPLES, SIZE, STRIDES, pool_boxes
from models.suppression import surest

_ALL = 2**31  # boxes of a class: no limit


def translations() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """The custom translation table for `torch.onnx.export`."""
    return {surest._opoverload: _surest, pool_boxes._opoverload: _pool_boxes}


def _surest(boxes: Any, scores: Any, iou_threshold: float, score_threshold: float) -> Any:
    # One class per row: ONNX's operator shares its boxes among classes, here every class has its own.
    chosen = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, _ints(1)),
        _ints(_ALL),
        _float(iou_threshold, 1),
        _float(score_threshold, 1),
    )  # [K, 3]: row, class, box
    cells = op.Gather(chosen, _ints(0, 2), axis=1)
    nothing = op.Mul(scores, _float(0.0))
    return op.ScatterND(nothing, cells, op.GatherND(scores, cells))


def _pool_boxes(p2: Any, p3: Any, p4: Any, p5: Any, boxes: Any, level: Any) -> Any:
    flat = op.Reshape(boxes, _ints(-1, 4))
    flat_level = op.Reshape(level, _ints(-1))
    rows = op.Shape(boxes, start=1, end=2)
    channels = op.Shape(p2, start=1, end=2)
    shape = op.Concat(op.Shape(flat, start=0, end=1), channels, _ints(SIZE, SIZE), axis=0)
    pooled = op.Expand(_float(0.0), shape)
    for number, (features, stride) in enumerate(zip((p2, p3, p4, p5), STRIDES, strict=True)):
        at = op.Reshape(op.NonZero(op.Equal(flat_level, _ints(number))), _ints(-1))
        found = op.RoiAlign(
            features,
            op.Gather(flat, at, axis=0),
            op.Div(at, rows),
            mode="avg",
            coordinate_transformation_mode="output_half_pixel",
            output_height=SIZE,
            output_width=SIZE,
            sampling_ratio=SAMPLES,
            spatial_scale=1 / stride,
        )
        pooled = op.ScatterND(pooled, op.Unsqueeze(at, _ints(1)), found)
    return pooled


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _float(value: float, axes: int = 0) -> Any:
    """A scalar, or [1]."""
    return op.Constant(value_floats=[value]) if axes else op.Constant(value_float=value)
