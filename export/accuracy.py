"""Figures on held-out data, measured through the ONNX file itself: what is published is what was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.arrays import Array
from export.samples import ImageSet
from export.verify import run
from models.entry import SeriesInput
from models.training.forecast_eval import evaluate, held_out, seasonal_naive
from rafaga.bundle import Metric

Advance = Callable[[int, int], None]  # how many of how many are done

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


def forecast(session: ort.InferenceSession, series: Array, shape: SeriesInput, dataset: str) -> tuple[Metric, ...]:
    """MASE, pinball loss and interval coverage by rolling origin, and the seasonal-naive MASE on the same origins."""

    def quantiles(history: Array, length: NDArray[np.int64]) -> Array:
        return run(session, {"history": history, "length": length})["quantiles"]

    origins = held_out(series, shape)
    naive = float(np.abs(origins.future - seasonal_naive(origins, shape)).mean()) / origins.scale
    return (
        *evaluate(origins, shape, quantiles, dataset),
        Metric(name="mase_seasonal_naive", value=naive, dataset=dataset, samples=len(origins.length)),
    )


def recorded_baseline(weights: Path, measured: tuple[Metric, ...]) -> tuple[Metric, ...]:
    """`mase_holt_winters` as training noted it beside the weights, where it was taken on the same origins.

    Fitting that model anew at every origin takes a minute, and its outcome does not depend on the network.
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


def top1(metrics: tuple[Metric, ...]) -> float | None:
    return next((metric.value for metric in metrics if metric.name == "top1"), None)


def _rank_of(labels: NDArray[np.int64], probabilities: Array) -> Array:
    """How many classes were thought likelier than the right one. Ties count against the model: [N]"""
    right = np.take_along_axis(probabilities, labels[:, np.newaxis], axis=1)
    ranks: Array = (probabilities >= right).sum(axis=1) - 1
    return ranks
