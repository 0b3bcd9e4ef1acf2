"""Small bundles for server tests: no torch, no training, answers that numpy can check."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from msgspec.structs import replace
from onnx import helper

from rafaga import bundle as bundles
from rafaga import publishing
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
from tests import plain

CLASSES = 10
LEVELS = (0.1, 0.5, 0.9)
HORIZON = 4
DIGITS = tuple(f"digit {i}" for i in range(CLASSES))


def random_images(seed: int, rows: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Random pixels, uint8 [rows, height, width, channels]."""
    return np.random.default_rng(seed).integers(0, 256, (rows, height, width, channels), dtype=np.uint8)


def classifier_weights() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, (28 * 28, CLASSES)).astype(np.float32)


def classify(images: np.ndarray) -> np.ndarray:
    """What the classifier answers, in numpy: uint8 [N, 28, 28, 1] -> probabilities [N, 10]."""
    logits = images.reshape(len(images), -1).astype(np.float32) / 255 @ classifier_weights()
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def publish_classifier(repository: Path, name: str = "digits") -> Path:
    graph = """(uint8[n,28,28,1] image) => (float[n,10] probabilities) <float scale = {255}> {
        pixels = Cast<to = 1>(image)
        scaled = Div(pixels, scale)
        flat = Flatten(scaled)
        logits = MatMul(flat, weight)
        probabilities = Softmax<axis = 1>(logits)
    }"""
    return _publish_digits(repository, name, graph, weight=classifier_weights())


def publish_slow(repository: Path, name: str = "slow", *, products: int = 2) -> Path:
    """Answers like the classifier, one row at a time, after some tens of milliseconds of needless products."""
    needless = "\n".join(f"product{i + 1} = MatMul(product{i}, needless)" for i in range(products))
    graph = f"""(uint8[n,28,28,1] image) => (float[n,10] probabilities)
    <float scale = {{255}}, float zero = {{0}}, int64[1] axis1 = {{1}}> {{
        pixels = Cast<to = 1>(image)
        scaled = Div(pixels, scale)
        flat = Flatten(scaled)
        logits = MatMul(flat, weight)
        brightest = ReduceMax<keepdims = 1>(flat, axis1)
        product0 = Mul(needless, brightest)
        {needless}
        largest = ReduceMax<keepdims = 0>(product{products})
        nothing = Mul(largest, zero)
        sum = Add(logits, nothing)
        probabilities = Softmax<axis = 1>(sum)
    }}"""
    square = np.full((1024, 1024), 1 / 1024, np.float32)
    weights = {"weight": classifier_weights(), "needless": square}
    return _publish_digits(repository, name, graph, rows=1, max_batch_size=1, **weights)


def _publish_digits(
    repository: Path, name: str, graph: str, rows: int = 3, max_batch_size: int = 32, **weights: np.ndarray
) -> Path:
    image = random_images(1, rows, 28, 28, 1)
    inputs, outputs, task = {"image": image}, {"probabilities": classify(image)}, Task.CLASSIFICATION
    return _publish(
        repository, name, graph, task, inputs, outputs, weights, labels=DIGITS, max_batch_size=max_batch_size
    )


def fragile(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 1, 1, 1] -> one-hot [N, 10] of the pixel, for pixels below 10; others are out of the table's range."""
    return np.eye(CLASSES, dtype=np.float32)[images[:, 0, 0, 0]]


def publish_fragile(repository: Path, name: str = "fragile") -> Path:
    """Fails on pixels of 10 and more."""
    graph = """(uint8[n,1,1,1] image) => (float[n,10] probabilities) <int64[1] flat = {-1}> {
        index = Cast<to = 7>(image)
        row = Reshape(index, flat)
        probabilities = Gather<axis = 0>(table, row)
    }"""
    image = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1)
    table, labels = {"table": np.eye(CLASSES, dtype=np.float32)}, tuple(f"class {i}" for i in range(CLASSES))
    inputs, outputs, task = {"image": image}, {"probabilities": fragile(image)}, Task.CLASSIFICATION
    return _publish(repository, name, graph, task, inputs, outputs, table, labels=labels)


def publish_uneven(repository: Path, name: str = "uneven", *, allow_non_finite: bool = False) -> Path:
    """Divides by the pixel: NaN for black."""
    graph = """(uint8[n,1,1,1] image) => (float[n,2] probabilities) <int64[2] flat = {-1, 1}> {
        value = Cast<to = 1>(image)
        column = Reshape(value, flat)
        one = Div(column, column)
        probabilities = Mul(one, halves)
    }"""
    image, halves = np.array([1, 7, 255], np.uint8).reshape(3, 1, 1, 1), np.array([[0.25, 0.75]], np.float32)
    inputs, outputs, task = {"image": image}, {"probabilities": np.tile(halves, (3, 1))}, Task.CLASSIFICATION
    fields: dict[str, Any] = {"labels": ("quarter", "rest"), "allow_non_finite": allow_non_finite}
    return _publish(repository, name, graph, task, inputs, outputs, {"halves": halves}, **fields)


def features(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H/2, W/2], every second pixel over 255."""
    return (images.transpose(0, 3, 1, 2)[:, :, ::2, ::2] / np.float32(255)).astype(np.float32)


def publish_backbone(repository: Path, name: str = "backbone") -> Path:
    graph = """(uint8[n,h,w,3] image) => (float[n,3,u,v] map) <float scale = {255}> {
        nchw = Transpose<perm = [0, 3, 1, 2]>(image)
        pixels = Cast<to = 1>(nchw)
        scaled = Div(pixels, scale)
        map = MaxPool<kernel_shape = [1, 1], strides = [2, 2]>(scaled)
    }"""
    image = random_images(2, 2, 32, 32)
    inputs, outputs, maps = {"image": image}, {"map": features(image)}, (FeatureSpec(output="map", stride=2),)
    return _publish(repository, name, graph, Task.FEATURES, inputs, outputs, features=maps)


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
    graph = """(uint8[n,32,32,3] image) => (float[n,10] probabilities) <float scale = {255}> {
        pixels = Cast<to = 1>(image)
        scaled = Div(pixels, scale)
        nchw = Transpose<perm = [0, 3, 1, 2]>(scaled)
        maps = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(nchw, first)
        rectified = Relu(maps)
        more = Conv<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(rectified, second)
        last = Relu(more)
        pooled = GlobalAveragePool(last)
        probabilities = Flatten(pooled)
    }"""
    image, weights = random_images(8, 4, 32, 32), dict(zip(("first", "second"), convolution_weights(), strict=True))
    inputs, outputs, task = {"image": image}, {"probabilities": convolve(image)}, Task.CLASSIFICATION
    return _publish(repository, name, graph, task, inputs, outputs, weights, labels=DIGITS)


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
    height, width = size or (None, None)
    shape = plain.typed("uint8", ("n", height or "h", width or "w", 3))
    graph = f"""({shape} image) => (float[n,3,4] boxes, float[n,3] scores, int64[n,3] labels)
    <int64[3] pixel_axes = {{1, 2, 3}}, int64[1] axis1 = {{1}}, int64[1] first = {{0}}, int64[4] sides = {{2, 1, 2, 1}},
     float[1,3,4] parts = {{0, 0, 1, 1, 0, 0, 0.5, 0.5, 0, 0, 0, 0}}, float[1,3] sureness = {{1, 0.5, 0}},
     int64[1,3] label = {{2, 1, 0}}, int64[1] one = {{1}}, int64[2] ones = {{1, 1}}, float white = {{255}}> {{
        pixels = Cast<to = 1>(image)
        mean = ReduceMean<keepdims = 0>(pixels, pixel_axes)
        column = Unsqueeze(mean, axis1)
        bright = Div(column, white)
        scores = Mul(bright, sureness)
        shape = Shape(image)
        batch = Gather(shape, first)
        corner = Gather(shape, sides)
        float_corner = Cast<to = 1>(corner)
        box = Mul(parts, float_corner)
        box_repeats = Concat<axis = 0>(batch, ones)
        boxes = Tile(box, box_repeats)
        label_repeats = Concat<axis = 0>(batch, one)
        labels = Tile(label, label_repeats)
    }}"""
    image = random_images(5, 2, *(size or (12, 20)))
    outputs = dict(zip(("boxes", "scores", "labels"), detect(image), strict=True))
    limits = DetectionSpec(max_objects=OBJECTS, score_threshold=0.05, iou_threshold=0.5)
    inputs, task = {"image": image}, Task.DETECTION
    return _publish(repository, name, graph, task, inputs, outputs, labels=THINGS, detection=limits)


COLOURS = ("red", "green", "blue")


def segment(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, H, W, 3] -> the strongest colour of each pixel, uint8 [N, H, W], and its value over 255."""
    return images.argmax(3).astype(np.uint8), images.max(3).astype(np.float32) / np.float32(255)


def publish_segmenter(repository: Path, name: str = "segmenter") -> Path:
    """Takes images of any size; the server brings encoded ones to a shorter side of 16, the longer at most 40."""
    graph = """(uint8[n,h,w,3] image) => (uint8[n,h,w] labels, float[n,h,w] probabilities)
    <int64[1] channel_axis = {3}, float scale = {255}> {
        pixels = Cast<to = 1>(image)
        index = ArgMax<axis = 3, keepdims = 0>(pixels)
        labels = Cast<to = 2>(index)
        strongest = ReduceMax<keepdims = 0>(pixels, channel_axis)
        probabilities = Div(strongest, scale)
    }"""
    image = random_images(6, 2, 12, 20)
    outputs = dict(zip(("labels", "probabilities"), segment(image), strict=True))
    preparation = ImagePreparation(height=None, width=None, channels=3, resize_shorter=16, max_longer=40)
    inputs, task = {"image": image}, Task.SEGMENTATION
    return _publish(repository, name, graph, task, inputs, outputs, labels=COLOURS, image=preparation)


ALPHABET = "abcd"


def predict(symbols: str) -> np.ndarray:
    """How often each symbol of the alphabet came, as probabilities [4]; the last one counts double."""
    counts = np.array([symbols.count(letter) for letter in ALPHABET], np.float32)
    counts[ALPHABET.index(symbols[-1])] += 1
    return counts / counts.sum()


def publish_sequence_model(repository: Path, name: str = "letters") -> Path:
    graph = """(int64[n,t] symbols, int64[n] length) => (float[n,4] probabilities)
    <int64 depth = {4}, float[2] values = {0, 1}, int64 zero = {0}, int64 one = {1}, int64[1] axis1 = {1}> {
        hot = OneHot<axis = -1>(symbols, depth, values)
        shape = Shape(symbols)
        longest = Gather<axis = 0>(shape, one)
        times = Range(zero, longest, one)
        column = Unsqueeze(length, axis1)
        inside = Less(times, column)
        last_index = Sub(column, one)
        last = Equal(times, last_index)
        weight = Cast<to = 1>(inside)
        bonus = Cast<to = 1>(last)
        weights = Add(weight, bonus)
        row = Unsqueeze(weights, axis1)
        sums = MatMul(row, hot)
        counts = Squeeze(sums, axis1)
        total = ReduceSum<keepdims = 1>(counts, axis1)
        probabilities = Div(counts, total)
    }"""
    strings = ("abca", "dd")
    symbols = np.array([[0, 1, 2, 0], [3, 3, 0, 0]])
    inputs = {"symbols": symbols, "length": np.array([len(s) for s in strings])}
    outputs = {"probabilities": np.stack([predict(s) for s in strings])}
    limits, labels = SequenceSpec(max_length=32), tuple(ALPHABET)
    return _publish(repository, name, graph, Task.SEQUENCE, inputs, outputs, labels=labels, sequence=limits)


DAILY = ForecastSpec(
    min_history=2, max_history=64, max_horizon=HORIZON, quantile_levels=LEVELS, season=1, step="day", unit="°C"
)
MONTHLY = replace(DAILY, season=12, step="month", unit="€", frequency="MS", covariates=("price", "calendar.month"))


def forecast(history: np.ndarray) -> np.ndarray:
    """float32 [T] -> [HORIZON, 3]: the last value, and a band of one tenth of the sum around it."""
    last, total = history[-1], history.sum(dtype=np.float32)
    band = np.float32(0.1) * total
    return np.tile(np.array([last - band, last, last + band], np.float32), (HORIZON, 1))


def publish_forecaster(repository: Path, name: str = "series", frequency: str = "") -> Path:
    graph = """(float[n,t] history, int64[n] length) => (float[n,4,3] quantiles)
    <int64[1] one = {1}, float[1,3] bands = {-0.1, 0, 0.1}, int64[3] repeats = {1, 4, 1}> {
        last_index = Sub(length, one)
        index = Unsqueeze(last_index, one)
        last = GatherElements<axis = 1>(history, index)
        total = ReduceSum<keepdims = 1>(history, one)
        band = Mul(total, bands)
        row = Add(last, band)
        rows = Unsqueeze(row, one)
        quantiles = Tile(rows, repeats)
    }"""
    history = np.random.default_rng(3).normal(size=(2, 6)).astype(np.float32)
    history[1, 4:] = 0
    length = np.array([6, 4], np.int64)
    inputs = {"history": history, "length": length}
    outputs = {"quantiles": np.stack([forecast(h[:n]) for h, n in zip(history, length, strict=True)])}
    spec = replace(DAILY, frequency=frequency)
    return _publish(repository, name, graph, Task.FORECASTING, inputs, outputs, forecast=spec)


def forecast_with_covariates(past: np.ndarray, future: np.ndarray) -> np.ndarray:
    """[T, 2] and [HORIZON, 2] -> [HORIZON, 3]: price and month of each step, and the sum of all prices before."""
    total = np.full(HORIZON, past[:, 0].sum(dtype=np.float32))
    return np.stack([future[:, 0], future[:, 1], total], axis=1)


def publish_forecaster_with_covariates(repository: Path, name: str = "sales") -> Path:
    """Monthly. Its answers show its covariates instead of quantiles."""
    graph = """(float[n,t] history, int64[n] length, float[n,t,2] past_covariates, float[n,4,2] future_covariates) =>
    (float[n,4,3] quantiles)
    <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[3] repeats = {1, 4, 1}> {
        prices = Slice(past_covariates, zero, one, two)
        total = ReduceSum<keepdims = 1>(prices, one)
        totals = Tile(total, repeats)
        kept = Concat<axis = 2>(future_covariates, totals)
        observed = Slice(history, zero, zero, one)
        nothing = ReduceSum<keepdims = 1>(observed, one)
        lengths = Unsqueeze(length, one)
        as_float = Cast<to = 1>(lengths)
        naught = Mul(nothing, as_float)
        column = Unsqueeze(naught, one)
        quantiles = Add(kept, column)
    }"""
    rng = np.random.default_rng(4)
    past, future = rng.normal(size=(2, 5, 2)).astype(np.float32), rng.normal(size=(2, HORIZON, 2)).astype(np.float32)
    inputs = {"history": past[:, :, 0], "length": np.array([5, 5])}
    inputs |= {"past_covariates": past, "future_covariates": future}
    outputs = {"quantiles": np.stack([forecast_with_covariates(*each) for each in zip(past, future, strict=True)])}
    return _publish(repository, name, graph, Task.FORECASTING, inputs, outputs, forecast=MONTHLY)


def _publish(
    repository: Path,
    name: str,
    graph: str,
    task: Task,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    constants: Mapping[str, np.ndarray] | None = None,
    **fields: Any,
) -> Path:
    """`inputs` and `outputs`: the golden arrays. `fields`: of the bundle."""
    model = plain.model(graph, **(constants or {}))

    def specs(values: Any) -> tuple[TensorSpec, ...]:
        types = {value.name: value.type.tensor_type for value in values}
        return tuple(
            TensorSpec(
                name=name,
                dtype=helper.tensor_dtype_to_np_dtype(kind.elem_type).name,
                shape=tuple(dim.dim_value or None for dim in kind.shape.dim),
            )
            for name, kind in types.items()
        )

    first = specs(model.graph.input)[0]
    if first.name == "image":
        _, height, width, channels = first.shape
        fields = {"image": ImagePreparation(height=height, width=width, channels=channels or 3), **fields}

    def fill(folder: Path, version: int) -> Bundle:
        onnx.save(model, folder / "model.onnx")
        golden = {f"input.{n}": a for n, a in inputs.items()} | {f"output.{n}": a for n, a in outputs.items()}
        np.savez(folder / bundles.GOLDEN, **golden)
        parity = Parity(max_absolute_error=0.0, max_relative_error=0.0, batch_sizes=(1,))
        return Bundle(
            schema=bundles.SCHEMA,
            name=name,
            version=version,
            architecture="a few nodes",
            task=task,
            dataset="none",
            inputs=specs(model.graph.input),
            outputs=specs(model.graph.output),
            weights=Weights(trained=True, source="test", license="Apache-2.0"),
            variants=(Variant(precision=Precision.FP32, file="model.onnx", parity=parity),),
            provenance=Provenance(created="2026-01-01T00:00:00Z", rafaga="0", torch="none", onnx="1", opset=18),
            files={},
            **fields,
        )

    return publishing.publish(repository, name, None, fill)


EVERY_TASK = (
    publish_classifier,
    publish_convolutions,
    publish_backbone,
    publish_detector,
    publish_segmenter,
    publish_forecaster,
    publish_sequence_model,
)
