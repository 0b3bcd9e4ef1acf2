"""Small bundles for server tests, made with onnx.helper: no torch, no training, answers that numpy can check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rafaga import bundle as bundles
from rafaga.bundle import (
    Bundle,
    FeatureSpec,
    ForecastSpec,
    ImagePreparation,
    Parity,
    Precision,
    Provenance,
    Task,
    TensorSpec,
    Variant,
    Weights,
)

CLASSES = 10
LEVELS = (0.1, 0.5, 0.9)
HORIZON = 4


def classifier_weights(size: int = 28) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, (size * size, CLASSES)).astype(np.float32)


def classify(images: np.ndarray) -> np.ndarray:
    """What the classifier answers, in numpy: uint8 [N, H, W, 1] -> probabilities [N, 10]."""
    logits = images.reshape(len(images), -1).astype(np.float32) / 255 @ classifier_weights(images.shape[1])
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def publish_classifier(repository: Path, name: str = "digits", *, size: int = 28, **changes: object) -> Path:
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["scaled"]),
        helper.make_node("Flatten", ["scaled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    constants = {"scale": np.float32(255), "weight": classifier_weights(size)}
    image = np.random.default_rng(1).integers(0, 256, (3, size, size, 1), dtype=np.uint8)
    return _publish(
        repository,
        nodes,
        constants,
        {"image": image},
        {"probabilities": classify(image)},
        {"image": (None, size, size, 1), "probabilities": (None, CLASSES)},
        name=name,
        task=Task.CLASSIFICATION,
        labels=tuple(f"digit {i}" for i in range(CLASSES)),
        image=ImagePreparation(height=size, width=size, channels=1),
        **changes,
    )


def features(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H/2, W/2], every second pixel over 255."""
    return (images.transpose(0, 3, 1, 2)[:, :, ::2, ::2] / np.float32(255)).astype(np.float32)


def publish_backbone(repository: Path, name: str = "backbone") -> Path:
    nodes = [
        helper.make_node("Transpose", ["image"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["nchw"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["scaled"]),
        helper.make_node("MaxPool", ["scaled"], ["map"], kernel_shape=[1, 1], strides=[2, 2]),
    ]
    image = np.random.default_rng(2).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    return _publish(
        repository,
        nodes,
        {"scale": np.float32(255)},
        {"image": image},
        {"map": features(image)},
        {"image": (None, None, None, 3), "map": (None, 3, None, None)},
        name=name,
        task=Task.FEATURES,
        image=ImagePreparation(height=None, width=None, channels=3),
        features=(FeatureSpec(output="map", stride=2),),
    )


def forecast(history: np.ndarray) -> np.ndarray:
    """float32 [T] -> [HORIZON, 3]: the last value, and a band of one tenth of the sum around it."""
    last, total = history[-1], history.sum(dtype=np.float32)
    band = np.float32(0.1) * total
    return np.tile(np.array([last - band, last, last + band], np.float32), (HORIZON, 1))


def publish_forecaster(repository: Path, name: str = "series") -> Path:
    nodes = [
        helper.make_node("Sub", ["length", "one"], ["last_index"]),
        helper.make_node("Unsqueeze", ["last_index", "axis1"], ["index"]),
        helper.make_node("GatherElements", ["history", "index"], ["last"], axis=1),
        helper.make_node("ReduceSum", ["history", "axis1"], ["total"], keepdims=1),
        helper.make_node("Mul", ["total", "bands"], ["band"]),
        helper.make_node("Add", ["last", "band"], ["row"]),
        helper.make_node("Unsqueeze", ["row", "axis1"], ["rows"]),
        helper.make_node("Tile", ["rows", "repeats"], ["quantiles"]),
    ]
    constants = {
        "one": np.array(1, np.int64),
        "axis1": np.array([1], np.int64),
        "bands": np.array([[-0.1, 0, 0.1]], np.float32),
        "repeats": np.array([1, HORIZON, 1], np.int64),
    }
    history = np.random.default_rng(3).normal(size=(2, 6)).astype(np.float32)
    history[1, 4:] = 0
    length = np.array([6, 4], np.int64)
    quantiles = np.stack([forecast(h[:n]) for h, n in zip(history, length, strict=True)])
    return _publish(
        repository,
        nodes,
        constants,
        {"history": history, "length": length},
        {"quantiles": quantiles},
        {"history": (None, None), "length": (None,), "quantiles": (None, HORIZON, len(LEVELS))},
        name=name,
        task=Task.FORECASTING,
        forecast=ForecastSpec(
            min_history=2, max_history=64, max_horizon=HORIZON, quantile_levels=LEVELS, season=1, step="day", unit="°C"
        ),
    )


def _publish(
    repository: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    inputs: dict[str, np.ndarray],
    outputs: dict[str, np.ndarray],
    shapes: dict[str, tuple[int | None, ...]],
    *,
    name: str,
    **fields: object,
) -> Path:
    def values(arrays: dict[str, np.ndarray]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), shapes[n])
            for n, a in arrays.items()
        ]

    def specs(arrays: dict[str, np.ndarray]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=n, dtype=a.dtype.name, shape=shapes[n]) for n, a in arrays.items())

    graph = helper.make_graph(
        nodes,
        name,
        values(inputs),
        values(outputs),
        [numpy_helper.from_array(np.asarray(c), n) for n, c in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

    def fill(folder: Path, version: int) -> Bundle:
        onnx.save(model, folder / "model.onnx")
        np.savez(
            folder / bundles.GOLDEN,
            **{f"input.{n}": a for n, a in inputs.items()},
            **{f"output.{n}": a for n, a in outputs.items()},
        )
        return Bundle(
            schema=bundles.SCHEMA,
            name=name,
            version=version,
            architecture="a few nodes",
            dataset="none",
            inputs=specs(inputs),
            outputs=specs(outputs),
            weights=Weights(trained=True, source="test", license="Apache-2.0"),
            variants=(
                Variant(
                    precision=Precision.FP32,
                    file="model.onnx",
                    parity=Parity(max_absolute_error=0.0, max_relative_error=0.0, batch_sizes=(1,)),
                ),
            ),
            provenance=Provenance(created="2026-01-01T00:00:00Z", rafaga="0", torch="none", onnx="1", opset=18),
            files={},
            **fields,  # type: ignore[arg-type]
        )

    return bundles.publish(repository, name, None, fill)
