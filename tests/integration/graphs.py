"""Models that misbehave: one fails on some inputs, one takes its time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from rafaga.bundle import ImagePreparation, Task
from tests.bundles import _publish, classifier_weights, classify

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


def publish_slow(repository: Path, name: str = "slow", *, products: int = 2) -> Path:
    """Answers like `bundles.classify`, one row at a time, after some tens of milliseconds of needless products."""
    size = 1024
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["scaled"]),
        helper.make_node("Flatten", ["scaled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
        helper.make_node("ReduceMax", ["flat", "axis1"], ["brightest"], keepdims=1),
        helper.make_node("Mul", ["needless", "brightest"], ["product0"]),
        *(helper.make_node("MatMul", [f"product{i}", "needless"], [f"product{i + 1}"]) for i in range(products)),
        helper.make_node("ReduceMax", [f"product{products}"], ["largest"], keepdims=0),
        helper.make_node("Mul", ["largest", "zero"], ["nothing"]),
        helper.make_node("Add", ["logits", "nothing"], ["sum"]),
        helper.make_node("Softmax", ["sum"], ["probabilities"], axis=1),
    ]
    constants = {
        "scale": np.float32(255),
        "weight": classifier_weights(),
        "axis1": np.array([1], np.int64),
        "needless": np.full((size, size), 1 / size, np.float32),
        "zero": np.array(0, np.float32),
    }
    image = np.random.default_rng(1).integers(0, 256, (1, 28, 28, 1), dtype=np.uint8)
    return _publish(
        repository,
        nodes,
        constants,
        {"image": image},
        {"probabilities": classify(image)},
        {"image": (None, 28, 28, 1), "probabilities": (None, CLASSES)},
        name=name,
        task=Task.CLASSIFICATION,
        labels=tuple(f"digit {i}" for i in range(CLASSES)),
        image=ImagePreparation(height=28, width=28, channels=1),
        max_batch_size=1,
    )
