"""Figures on held-out data, measured with the ONNX file that is published.

classification   `top1`, `top5`: against the labels; `map`, `f1` of independent labels, see `multilabel`
regression       `mae`, `skill`: against the targets; `agreement` with the fp32 file's values, see `regression`
maps             `similarity`: cosine with the fp32 file's maps, because maps have no labels; `channels`: share of the
                 channels whose own cosine is at least 0.9
embedding        `recall_at_10`: share of each image's ten nearest by the fp32 file that are found; and `similarity`
segmentation     `agreement`: share of pixels with the fp32 file's class
sequence         `legal`, `remembered`: next symbols that the grammar allows, and long-range dependencies kept
forecasting      `mase`, `pinball`, `coverage_P` of intervals, `coverage_qP` of quantiles: against the observations
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.arrays import Array, Arrays, pad_symbols
from export.samples import ImageSet
from export.verify import Advance, run
from models.training import reber
from models.training.forecast_eval import errors, evaluate, forecast_by, held_out, metrics_of, quantiles_of
from rafaga.bundle import ForecastSpec, Metric
from rafaga.evaluation import SEASONAL_NAIVE

_PIXEL_CLASSES = 256  # one byte
_SEQUENCES = 1024  # of one batch
_BATCH_BYTES = 1 << 20  # pixels of one batch: large enough for throughput, small enough for the caches


# Noise of half the signal: less similar channels are lost.
_KEPT_CHANNEL = 0.9


@dataclass(frozen=True)
class Answers:
    """A classifier's most probable class and the right one, of every sample: int64 [N] each. Of a multilabel one: the
    labels that it gives and the right ones, bool [N, labels] each. Of a regression model: its values and the targets,
    float [N, outputs] each."""

    classes: Array
    right: Array


@dataclass(frozen=True)
class Part:
    """A class, and the share of its samples that a smaller file loses. `samples` of a segmenter: images."""

    index: int
    samples: int
    loss: float


@dataclass(frozen=True)
class Measured:
    """The figures of one file. `answers`: of a classifier. `parts`: of a segmenter, against the fp32 file."""

    metrics: tuple[Metric, ...] = ()
    answers: Answers | None = None
    parts: tuple[Part, ...] = ()


def spread(total: int, limit: int | None) -> list[int]:
    """All rows, or `limit` of them spread evenly: labelled sets often lie sorted by class."""
    if limit is None or limit >= total:
        return list(range(total))
    return [round(row) for row in np.linspace(0, total - 1, limit)]


def outputs_of(session: ort.InferenceSession, images: ImageSet, chosen: Sequence[int], advance: Advance) -> Array:
    """A classifier's output for the `chosen` images: [N, outputs]"""
    size = max(1, _BATCH_BYTES // images.read([0]).nbytes)
    found: list[Array] = []
    for start in range(0, len(chosen), size):
        pixels = images.read(chosen[start : start + size])
        found += run(session, {"image": pixels}).values()
        advance(start + len(pixels), len(chosen))
    return np.concatenate(found)


def classify(
    session: ort.InferenceSession,
    images: ImageSet,
    limit: int | None = None,
    advance: Advance = lambda *_: None,
    baseline: Measured | None = None,
) -> Measured:
    """`top1`, and `top5` where there are more than five classes, as fractions of 1.

    `baseline`: of the fp32 file on the same images. With it also `agreement`, the share of equal most probable classes.
    """
    chosen = spread(len(images), limit)
    hits1 = hits5 = 0
    count = 0
    found: list[Array] = []
    size = max(1, _BATCH_BYTES // images.read([0]).nbytes)
    for start in range(0, len(chosen), size):
        rows = chosen[start : start + size]
        probabilities = run(session, {"image": images.read(rows)})["probabilities"]
        ranks = _rank_of(images.labels[rows], probabilities)
        hits1 += int((ranks < 1).sum())
        hits5 += int((ranks < 5).sum())
        count = probabilities.shape[1]
        found.append(probabilities.argmax(axis=1))
        advance(start + len(rows), len(chosen))
    answers = Answers(np.concatenate(found), images.labels[chosen])
    figures = {"top1": hits1, **({"top5": hits5} if count > 5 else {})}
    if baseline is not None and baseline.answers is not None:
        figures["agreement"] = int((answers.classes == baseline.answers.classes).sum())
    metrics = (
        Metric(name=name, value=hits / len(chosen), dataset=images.name, samples=len(chosen))
        for name, hits in figures.items()
    )
    return Measured(tuple(metrics), answers)


def resemble(
    session: ort.InferenceSession,
    fp32: ort.InferenceSession,
    images: ImageSet,
    limit: int | None = None,
    advance: Advance = lambda *_: None,
) -> Measured:
    """How close a smaller file's features are to those of the file `fp32`, as fractions of 1.

    `recall_at_10`, for an embedding [N, D]: nearest neighbours of every image among the others, by the dot product.
    `similarity`: the mean over the images, of the output where it is lowest.
    `channels`, for maps [N, C, h, w]: share of the channels whose values, over all images, are similar; of the output
    where it is lowest. Channels that the fp32 file never uses do not count.
    """
    chosen = spread(len(images), limit)
    cosines: dict[str, list[float]] = {}
    embeddings: dict[str, list[tuple[Array, Array]]] = {}
    channels: dict[str, Array] = {}
    for found, reference in _both(session, fp32, images, chosen, advance):
        for name, expected in reference.items():
            cosines.setdefault(name, []).extend(_cosine(found[name], expected))
            if expected.ndim == 4:
                channels[name] = channels.get(name, 0) + _channel_products(found[name], expected)
            if expected.ndim == 2:
                embeddings.setdefault(name, []).append((found[name], expected))
    recalls = [
        recall(np.concatenate([found for found, _ in pairs]), np.concatenate([expected for _, expected in pairs]))
        for pairs in embeddings.values()
    ]
    figures = {
        **({"recall_at_10": min(recalls)} if recalls else {}),
        "similarity": min(float(np.mean(values)) for values in cosines.values()),
        **({"channels": min(map(_kept_channels, channels.values()))} if channels else {}),
    }
    return Measured(
        tuple(
            Metric(name=name, value=value, dataset=images.name, samples=len(chosen)) for name, value in figures.items()
        )
    )


def agree(
    session: ort.InferenceSession,
    fp32: ort.InferenceSession,
    images: ImageSet,
    limit: int | None = None,
    advance: Advance = lambda *_: None,
) -> Measured:
    """`agreement`: share of pixels where a smaller file's `labels` [N, H, W] equal those of the file `fp32`.

    The parts are the classes of that file. Their samples are the images in which they occur: pixels of one image are
    not independent.
    """
    chosen = spread(len(images), limit)
    same: list[float] = []
    kept, pixels, occurs = np.zeros((3, _PIXEL_CLASSES), dtype=np.int64)
    for found, reference in _both(session, fp32, images, chosen, advance):
        for ours, theirs in zip(found["labels"], reference["labels"], strict=True):
            equal = ours == theirs
            same.append(float(equal.mean()))
            count = np.bincount(theirs.ravel(), minlength=_PIXEL_CLASSES)
            kept += np.bincount(theirs[equal], minlength=_PIXEL_CLASSES)
            pixels += count
            occurs += count > 0
    metric = Metric(name="agreement", value=float(np.mean(same)), dataset=images.name, samples=len(chosen))
    parts = (Part(int(i), int(occurs[i]), float(1 - kept[i] / pixels[i])) for i in np.flatnonzero(pixels))
    return Measured((metric,), parts=tuple(parts))


def _both(
    session: ort.InferenceSession,
    fp32: ort.InferenceSession,
    images: ImageSet,
    chosen: Sequence[int],
    advance: Advance,
) -> Iterator[tuple[Arrays, Arrays]]:
    """The answers of both files, batch by batch."""
    size = max(1, _BATCH_BYTES // images.read([0]).nbytes)
    for start in range(0, len(chosen), size):
        pixels = {"image": images.read(chosen[start : start + size])}
        yield run(session, pixels), run(fp32, pixels)
        advance(start + len(pixels["image"]), len(chosen))


def recall(found: Array, reference: Array, neighbours: int = 10) -> float:
    """Share of each row's nearest others by `reference` [N, D] that are also among the nearest by `found` [N, D]."""
    nearest = [_nearest(embedding, min(neighbours, len(embedding) - 1)) for embedding in (found, reference)]
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(*nearest, strict=True)]))


def forecast(
    session: ort.InferenceSession,
    series: Sequence[Array],
    covariates: Sequence[Array],
    shape: ForecastSpec,
    dataset: str,
) -> tuple[Metric, ...]:
    """MASE, pinball loss and coverage by rolling origin, and the seasonal-naive MASE on the same origins."""
    origins = held_out(series, shape, covariates)
    quantiles = quantiles_of(lambda inputs: run(session, inputs)["quantiles"], origins)
    naive = errors(origins, forecast_by(SEASONAL_NAIVE, origins, shape))
    return (
        *evaluate(origins, shape, quantiles, dataset),
        *metrics_of({"mase_seasonal_naive": naive}, dataset, origins),
    )


def next_symbols(session: ort.InferenceSession) -> tuple[Metric, ...]:
    """`legal` and `remembered`, on strings of the embedded Reber grammar that training never saw."""

    def following(beginnings: list[str]) -> NDArray[np.int64]:
        likeliest = []
        for start in range(0, len(beginnings), _SEQUENCES):
            sequences = [reber.indices(string) for string in beginnings[start : start + _SEQUENCES]]
            likeliest.append(run(session, pad_symbols(sequences))["probabilities"].argmax(axis=1))
        return np.concatenate(likeliest)

    return reber.figures(following)


def recorded_baseline(weights: Path, measured: tuple[Metric, ...]) -> tuple[Metric, ...]:
    """`mase_holt_winters` from the training record, if it was measured on the same origins.

    Fitting that model at every origin takes a minute, and the result does not depend on the network.
    """
    record = weights.with_suffix(".json")
    if not record.is_file():
        return ()
    noted = msgspec.json.decode(record.read_bytes(), type=_Record).metrics
    same = {(metric.dataset, metric.samples) for metric in measured}
    return tuple(m for m in noted if m.name == "mase_holt_winters" and (m.dataset, m.samples) in same)


class _Record(msgspec.Struct):
    """The part of a training record that is read here."""

    metrics: tuple[Metric, ...]


def value_of(name: str, metrics: tuple[Metric, ...]) -> float | None:
    return next((metric.value for metric in metrics if metric.name == name), None)


def _cosine(found: Array, reference: Array) -> list[float]:
    """Of each flattened row. Two rows of zeros: 1; a row of zeros and another one: 0."""
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (found, reference))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    equal = (a == b).all(axis=1).astype(np.float64)
    cosines: list[float] = np.divide((a * b).sum(axis=1), norms, out=equal, where=norms > 0).tolist()
    return cosines


def _channel_products(found: Array, reference: Array) -> Array:
    """Of maps [N, C, h, w]: the sums of a b, a a and b b of every channel [3, C]"""
    a, b = found.astype(np.float64), reference.astype(np.float64)
    return np.stack([(one * other).sum(axis=(0, 2, 3)) for one, other in ((a, b), (a, a), (b, b))])


def _kept_channels(products: Array) -> float:
    both, found, reference = products[:, products[2] > 0]
    return float((both >= _KEPT_CHANNEL * np.sqrt(found * reference)).mean()) if both.size else 1.0


def _nearest(embedding: Array, count: int) -> list[list[int]]:
    similarity = embedding @ embedding.T
    np.fill_diagonal(similarity, -np.inf)
    nearest: list[list[int]] = np.argsort(-similarity, axis=1, kind="stable")[:, :count].tolist()
    return nearest


def _rank_of(labels: NDArray[np.int64], probabilities: Array) -> Array:
    """How many classes got a higher probability than the right one. Ties and NaN count against the model: [N]"""
    right = np.take_along_axis(probabilities, labels[:, np.newaxis], axis=1)
    ranks: Array = (~(probabilities < right)).sum(axis=1) - 1
    return ranks
