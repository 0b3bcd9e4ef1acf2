"""A model that fails on some inputs, to see who else suffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper
from rafaga.bundle import ImagePreparation, Task

from tests.bundles import _publish

CLASSES = 10


def fragile(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 1, 1, 1] -> one-hot [N, 10] of the pixel, for pixels below 10; others are out of the table's range."""
    return np.eye(CLASSES, dtype=np.float32)[images[:, 0, 0, 0]]


def publish_fragile(repository: Path, name: str = "fragile") -> Path:
    nodes = [
        helper.make_node("Cast", ["image"], ["index"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["index", "flat"], ["row"]),
        helper.make_node("Gather", ["table", "row"], ["probabilities"], axis=0),
    ]
    image = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1)
    return _publish(
        repository,
        nodes,
        {"flat": np.array([-1], np.int64), "table": np.eye(CLASSES, dtype=np.float32)},
        {"image": image},
        {"probabilities": fragile(image)},
        {"image": (None, 1, 1, 1), "probabilities": (None, CLASSES)},
        name=name,
        task=Task.CLASSIFICATION,
        labels=tuple(f"class {i}" for i in range(CLASSES)),
        image=ImagePreparation(height=1, width=1, channels=1),
    )
