"""Accuracy of a multilabel classifier, on photos with any number of labels.

The folder of the photos has a file labels.csv: `photos/1.jpg,cat,dog`, the path of a photo and its labels, if any.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.accuracy import Answers, Measured, Part, spread
from export.arrays import Array
from export.labels import Labels, LabelsInvalid
from export.samples import ImageSet
from export.verify import Advance, run
from rafaga.bundle import Metric

FILE = "labels.csv"
_BATCH_BYTES = 8 << 20


def marks(files: Sequence[Path], folder: Path, labels: Labels) -> NDArray[np.int64]:
    """[N, labels], 1 where a photo has the label. Raises LabelsInvalid."""
    path = folder / FILE
    if not path.is_file():
        raise LabelsInvalid(f"{path}: missing; --head multilabel needs lines such as photo.jpg,label,label")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = {row[0].strip(): [word.strip() for word in row[1:] if word.strip()] for row in csv.reader(file) if row}
    places = {name: place for place, name in enumerate(labels.names)}
    found = np.zeros((len(files), len(places)), np.int64)
    for number, photo in enumerate(files):
        name = photo.relative_to(folder).as_posix()
        if name not in rows:
            raise LabelsInvalid(f"{path}: no line for {name}; a photo without labels has a line with its name alone")
        for label in rows[name]:
            if label not in places:
                raise LabelsInvalid(f"{path}: {name} has the label {label!r}, which the model does not have")
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
    size = max(1, _BATCH_BYTES // images.read([0]).nbytes)
    answers = []
    for start in range(0, len(chosen), size):
        rows = chosen[start : start + size]
        answers.append(run(session, {"image": images.read(rows)})["probabilities"])
        advance(start + len(rows), len(chosen))
    probabilities, right = np.concatenate(answers), images.labels[chosen].astype(bool)
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
