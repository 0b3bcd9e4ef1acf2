"""Figures on held-out data, measured with the ONNX file that is published.

classification   `top1`, `top5`: against the labels
maps             `similarity`: cosine with the fp32 file's maps, because maps have no labels
embedding        `recall_at_10`: share of each image's ten nearest by the fp32 file that are found; and `similarity`
segmentation     `agreement`: share of pixels with the fp32 file's class
sequence         `legal`, `remembered`: next symbols that the grammar allows, and long-range dependencies kept
forecasting      `mase`, `pinball`, `coverage_P` of intervals, `coverage_qP` of quantiles: against the observations
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.arrays import Array, Arrays, pad_symbols
from export.samples import ImageSet
from export.verify import Advance, run
from models.training import reber
from models.training.forecast_eval import errors, evaluate, held_out, metrics_of, quantiles_of, seasonal_naive
from rafaga.bundle import ForecastSpec, Metric

_SEQUENCES = 1024  # of one batch
_BATCH_BYTES = 8 << 20  # pixels of one batch: large enough for throughput, small enough for any machine


def spread(total: int, limit: int | None) -> list[int]:
    """All rows, or `limit` of them spread evenly: labelled sets often lie sorted by class."""
    if limit is None or limit >= total:
        return list(range(total))
    return [round(row) for row in np.linspace(0, total - 1, limit)]


def classify(
    session: ort.InferenceSession, images: ImageSet, limit: int | None = None, advance: Advance = lambda *_: None
) -> tuple[Metric, ...]:
    """`top1`, and `top5` where there are more than five classes, as fractions of 1."""
    chosen = spread(len(images), limit)
    hits1 = hits5 = 0
    classes = 0
    size = max(1, _BATCH_BYTES // images.read([0]).nbytes)
    for start in range(0, len(chosen), size):
        rows = chosen[start : start + size]
        probabilities = run(session, {"image": images.read(rows)})["probabilities"]
        ranks = _rank_of(images.labels[rows], probabilities)
        hits1 += int((ranks < 1).sum())
        hits5 += int((ranks < 5).sum())
        classes = probabilities.shape[1]
        advance(start + len(rows), len(chosen))
    figures = {"top1": hits1, **({"top5": hits5} if classes > 5 else {})}
    return tuple(
        Metric(name=name, value=hits / len(chosen), dataset=images.name, samples=len(chosen))
        for name, hits in figures.items()
    )


def resemble(
    session: ort.InferenceSession,
    fp32: ort.InferenceSession,
    images: ImageSet,
    limit: int | None = None,
    advance: Advance = lambda *_: None,
) -> tuple[Metric, ...]:
    """How close a smaller file's features are to those of the file `fp32`, as fractions of 1.

    `recall_at_10`, for an embedding [N, D]: nearest neighbours of every image among the others, by the dot product.
    `similarity`: the mean over the images, of the output where it is lowest.
    """
    chosen = spread(len(images), limit)
    cosines: dict[str, list[float]] = {}
    embeddings: dict[str, list[tuple[Array, Array]]] = {}
    for found, reference in _both(session, fp32, images, chosen, advance):
        for name, expected in reference.items():
            cosines.setdefault(name, []).extend(_cosine(found[name], expected))
            if expected.ndim == 2:
                embeddings.setdefault(name, []).append((found[name], expected))
    recalls = [
        recall(np.concatenate([found for found, _ in pairs]), np.concatenate([expected for _, expected in pairs]))
        for pairs in embeddings.values()
    ]
    figures = {
        **({"recall_at_10": min(recalls)} if recalls else {}),
        "similarity": min(float(np.mean(values)) for values in cosines.values()),
    }
    return tuple(
        Metric(name=name, value=value, dataset=images.name, samples=len(chosen)) for name, value in figures.items()
    )


def agree(
    session: ort.InferenceSession,
    fp32: ort.InferenceSession,
    images: ImageSet,
    limit: int | None = None,
    advance: Advance = lambda *_: None,
) -> tuple[Metric, ...]:
    """`agreement`: share of pixels where a smaller file's `labels` [N, H, W] equal those of the file `fp32`."""
    chosen = spread(len(images), limit)
    same = [
        (found["labels"] == reference["labels"]).mean(axis=(1, 2))
        for found, reference in _both(session, fp32, images, chosen, advance)
    ]
    value = float(np.concatenate(same).mean())
    return (Metric(name="agreement", value=value, dataset=images.name, samples=len(chosen)),)


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
    session: ort.InferenceSession, series: Sequence[Array], shape: ForecastSpec, dataset: str
) -> tuple[Metric, ...]:
    """MASE, pinball loss and coverage by rolling origin, and the seasonal-naive MASE on the same origins."""

    def quantiles(history: Array, length: NDArray[np.int64]) -> Array:
        return run(session, {"history": history, "length": length})["quantiles"]

    origins = held_out(series, shape)
    naive = float(errors(origins, seasonal_naive(origins, shape)).mean())
    return (
        *evaluate(origins, shape, quantiles_of(quantiles, origins), dataset),
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
