"""Accuracy of a multilabel classifier, on photos with any number of labels.

The folder of the photos has a file labels.csv, see `labels.lines_of`: `photos/1.jpg,cat,dog`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.accuracy import Answers, Measured, Part, outputs_of, spread
from export.arrays import Array
from export.labels import LINES, Labels, LabelsInvalid, lines_of
from export.samples import ImageSet
from export.verify import Advance
from rafaga.bundle import Metric


def marks(files: Sequence[Path], folder: Path, labels: Labels) -> NDArray[np.int64]:
    """[N, labels], 1 where a photo has the label. Raises LabelsInvalid."""
    places = {name: place for place, name in enumerate(labels.names)}
    found = np.zeros((len(files), len(places)), np.int64)
    for number, (photo, words) in enumerate(lines_of(files, folder, "label,label, or the photo alone")):
        for label in filter(None, words):
            if label not in places:
                raise LabelsInvalid(f"{folder / LINES}: {photo} has the label {label!r}, which the model does not have")
            found[number, places[label]] = 1
    return found


def measure(
    session: ort.InferenceSession,
    images: ImageSet,
    limit: int | None = None,
    advance: Advance = lambda *_: None,
    baseline: Measured | None = None,
) -> Measured:
    """`map`: mean over the labels that occur of the average precision; `f1`: of all decisions at 0.5 (micro-averaged).
    Fractions of 1. With the `baseline` of the fp32 file, the loss of recall of each label too.
    """
    chosen = spread(len(images), limit)
    probabilities, right = outputs_of(session, images, chosen, advance), images.labels[chosen].astype(bool)
    occurring = np.flatnonzero(right.any(axis=0)).tolist()
    precisions = [average_precision(probabilities[:, i], right[:, i]) for i in occurring]
    said = probabilities >= 0.5
    decisions = int(said.sum() + right.sum())
    figures = {
        "map": float(np.mean(precisions)) if precisions else 0.0,
        "f1": 2 * int((said & right).sum()) / decisions if decisions else 1.0,
    }
    metrics = tuple(Metric(name=n, value=v, dataset=images.name, samples=len(chosen)) for n, v in figures.items())
    if baseline is None or baseline.answers is None:
        return Measured(metrics, Answers(said, right))
    lost = (baseline.answers.classes & right).sum(axis=0) - (said & right).sum(axis=0)
    counts = right.sum(axis=0)
    return Measured(metrics, parts=tuple(Part(i, int(counts[i]), float(lost[i] / counts[i])) for i in occurring))


def average_precision(scores: Array, right: NDArray[np.bool_]) -> float:
    """Mean over the right rows of the precision at their rank (all-points average precision). Equal scores count
    against the model: the wrong ones come first."""
    order = np.lexsort((right, -scores.astype(np.float64)))
    hits = right[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean())
