"""Small bundles for server tests, made with onnx.helper: no torch, no training, answers that numpy can check."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rafaga import bundle as bundles
from rafaga.bundle import (
    Bundle,
    DetectionSpec,
    FeatureSpec,
    ForecastSpec,
    ImagePreparation,
    Parity,
    Precision,
    Provenance,
    SequenceSpec,
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
    constants = {"scale": np.array(255, np.float32), "weight": classifier_weights(size)}
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
        {"scale": np.array(255, np.float32)},
        {"image": image},
        {"map": features(image)},
        {"image": (None, None, None, 3), "map": (None, 3, None, None)},
        name=name,
        task=Task.FEATURES,
        image=ImagePreparation(height=None, width=None, channels=3),
        features=(FeatureSpec(output="map", stride=2),),
    )


def convolution_weights() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    first, second = rng.normal(0, 0.2, (16, 3, 3, 3)), rng.normal(0, 0.1, (CLASSES, 16, 3, 3))
    return first.astype(np.float32), second.astype(np.float32)


def convolve(images: np.ndarray) -> np.ndarray:
    """What the convolutions answer, in numpy: uint8 [N, 32, 32, 3] -> [N, 10]."""
    maps = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    for weights, stride in zip(convolution_weights(), (1, 2), strict=True):
        padded = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
        maps = np.maximum(np.einsum("nchwij,ocij->nohw", windows, weights, optimize=True), 0)
    return maps.mean((2, 3))


def publish_convolutions(repository: Path, name: str = "convolutions") -> Path:
    """What cuDNN, memory layouts and rounding matter for."""
    first, second = convolution_weights()
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "first"], ["maps"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["maps"], ["rectified"]),
        helper.make_node(
            "Conv", ["rectified", "second"], ["more"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]
        ),
        helper.make_node("Relu", ["more"], ["last"]),
        helper.make_node("GlobalAveragePool", ["last"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["probabilities"]),
    ]
    image = np.random.default_rng(8).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    return _publish(
        repository,
        nodes,
        {"scale": np.array(255, np.float32), "first": first, "second": second},
        {"image": image},
        {"probabilities": convolve(image)},
        {"image": (None, 32, 32, 3), "probabilities": (None, CLASSES)},
        name=name,
        task=Task.CLASSIFICATION,
        image=ImagePreparation(height=32, width=32, channels=3),
        labels=tuple(str(n) for n in range(CLASSES)),
    )


OBJECTS = 3
THINGS = ("nothing", "dark thing", "bright thing")


def detect(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 [N, H, W, 3] -> boxes [N, 3, 4], scores [N, 3], labels [N, 3].

    Always two objects: the whole image, as sure as it is bright, and its upper left quarter, half as sure.
    """
    n, height, width = images.shape[:3]
    score = images.reshape(n, -1).mean(1, dtype=np.float32) / np.float32(255)
    box = np.array([[0, 0, width, height], [0, 0, width / 2, height / 2], [0, 0, 0, 0]], np.float32)
    scores = score[:, None] * np.array([[1, 0.5, 0]], np.float32)
    return np.tile(box, (n, 1, 1)), scores, np.tile(np.array([[2, 1, 0]]), (n, 1))


def publish_detector(repository: Path, name: str = "detector", size: tuple[int, int] | None = (8, 16)) -> Path:
    """`size`: height and width of its input, to which the server brings images; None: any size."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "pixel_axes"], ["mean"], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "axis1"], ["column"]),
        helper.make_node("Mul", ["column", "sureness"], ["scores"]),
        helper.make_node("Shape", ["image"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["batch"]),
        helper.make_node("Gather", ["shape", "box_axes"], ["sides"]),
        helper.make_node("Cast", ["sides"], ["float_sides"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["parts", "float_sides"], ["box"]),
        helper.make_node("Concat", ["batch", "ones"], ["box_repeats"], axis=0),
        helper.make_node("Tile", ["box", "box_repeats"], ["boxes"]),
        helper.make_node("Concat", ["batch", "one"], ["label_repeats"], axis=0),
        helper.make_node("Tile", ["label", "label_repeats"], ["labels"]),
    ]
    constants = {
        "pixel_axes": np.array([1, 2, 3]),
        "axis1": np.array([1]),
        "sureness": np.array([[1, 0.5, 0]], np.float32) / np.float32(255),
        "first": np.array([0]),
        "box_axes": np.array([2, 1, 2, 1]),
        "parts": np.array([[[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0, 0, 0, 0]]], np.float32),
        "one": np.array([1]),
        "ones": np.array([1, 1]),
        "label": np.array([[2, 1, 0]]),
    }
    height, width = size or (None, None)
    image = np.random.default_rng(5).integers(0, 256, (2, *(size or (12, 20)), 3), dtype=np.uint8)
    boxes, scores, labels = detect(image)
    return _publish(
        repository,
        nodes,
        constants,
        {"image": image},
        {"boxes": boxes, "scores": scores, "labels": labels},
        {
            "image": (None, height, width, 3),
            "boxes": (None, OBJECTS, 4),
            "scores": (None, OBJECTS),
            "labels": (None, OBJECTS),
        },
        name=name,
        task=Task.DETECTION,
        labels=THINGS,
        image=ImagePreparation(height=height, width=width, channels=3),
        detection=DetectionSpec(max_objects=OBJECTS, score_threshold=0.05, iou_threshold=0.5),
    )


COLOURS = ("red", "green", "blue")


def segment(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, H, W, 3] -> the strongest colour of each pixel, uint8 [N, H, W], and its value over 255."""
    return images.argmax(3).astype(np.uint8), images.max(3).astype(np.float32) / np.float32(255)


def publish_segmenter(repository: Path, name: str = "segmenter") -> Path:
    """Takes images of any size; the server brings encoded ones to a shorter side of 16, the longer at most 40."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ArgMax", ["float"], ["index"], axis=3, keepdims=0),
        helper.make_node("Cast", ["index"], ["labels"], to=TensorProto.UINT8),
        helper.make_node("ReduceMax", ["float", "channel_axis"], ["strongest"], keepdims=0),
        helper.make_node("Div", ["strongest", "scale"], ["probabilities"]),
    ]
    image = np.random.default_rng(6).integers(0, 256, (2, 12, 20, 3), dtype=np.uint8)
    labels, probabilities = segment(image)
    return _publish(
        repository,
        nodes,
        {"channel_axis": np.array([3]), "scale": np.array(255, np.float32)},
        {"image": image},
        {"labels": labels, "probabilities": probabilities},
        {"image": (None, None, None, 3), "labels": (None, None, None), "probabilities": (None, None, None)},
        name=name,
        task=Task.SEGMENTATION,
        labels=COLOURS,
        image=ImagePreparation(height=None, width=None, channels=3, resize_shorter=16, max_longer=40),
    )


ALPHABET = "abcd"


def predict(symbols: str) -> np.ndarray:
    """How often each symbol of the alphabet came, as probabilities [4]; the last one counts double."""
    counts = np.array([symbols.count(letter) for letter in ALPHABET], np.float32)
    counts[ALPHABET.index(symbols[-1])] += 1
    return counts / counts.sum()


def publish_sequence_model(repository: Path, name: str = "letters") -> Path:
    nodes = [
        helper.make_node("OneHot", ["symbols", "depth", "values"], ["hot"], axis=-1),
        helper.make_node("Shape", ["symbols"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["longest"], axis=0),
        helper.make_node("Range", ["zero", "longest", "one"], ["times"]),
        helper.make_node("Unsqueeze", ["length", "axis1"], ["column"]),
        helper.make_node("Less", ["times", "column"], ["inside"]),
        helper.make_node("Sub", ["column", "one"], ["last_index"]),
        helper.make_node("Equal", ["times", "last_index"], ["last"]),
        helper.make_node("Cast", ["inside"], ["weight"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["last"], ["bonus"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["weight", "bonus"], ["weights"]),
        helper.make_node("Unsqueeze", ["weights", "axis1"], ["row"]),
        helper.make_node("MatMul", ["row", "hot"], ["sums"]),
        helper.make_node("Squeeze", ["sums", "axis1"], ["counts"]),
        helper.make_node("ReduceSum", ["counts", "axis1"], ["total"], keepdims=1),
        helper.make_node("Div", ["counts", "total"], ["probabilities"]),
    ]
    constants = {
        "depth": np.array(len(ALPHABET)),
        "values": np.array([0, 1], np.float32),
        "zero": np.array(0),
        "one": np.array(1),
        "axis1": np.array([1]),
    }
    strings = ("abca", "dd")
    symbols = np.zeros((2, 4), np.int64)
    for row, string in zip(symbols, strings, strict=True):
        row[: len(string)] = [ALPHABET.index(letter) for letter in string]
    return _publish(
        repository,
        nodes,
        constants,
        {"symbols": symbols, "length": np.array([len(s) for s in strings])},
        {"probabilities": np.stack([predict(s) for s in strings])},
        {"symbols": (None, None), "length": (None,), "probabilities": (None, len(ALPHABET))},
        name=name,
        task=Task.SEQUENCE,
        labels=tuple(ALPHABET),
        sequence=SequenceSpec(max_length=32),
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
    constants: Mapping[str, Any],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    shapes: dict[str, tuple[int | None, ...]],
    *,
    name: str,
    **fields: object,
) -> Path:
    def values(arrays: Mapping[str, np.ndarray]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), shapes[n])
            for n, a in arrays.items()
        ]

    def specs(arrays: Mapping[str, np.ndarray]) -> tuple[TensorSpec, ...]:
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
        golden: dict[str, Any] = {f"input.{n}": a for n, a in inputs.items()}
        np.savez(folder / bundles.GOLDEN, **golden | {f"output.{n}": a for n, a in outputs.items()})
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
