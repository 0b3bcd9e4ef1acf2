"""Accuracy of a regression model: values against the targets of photos.

The folder of the photos has a file labels.csv, see `labels.lines_of`: `photos/1.jpg,31.5`, a photo and its target for
each output, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.accuracy import Answers, Measured, outputs_of, spread
from export.labels import LINES, Labels, LabelsInvalid, lines_of
from export.samples import ImageSet
from export.verify import Advance
from rafaga.bundle import Metric


def targets(files: Sequence[Path], folder: Path, labels: Labels) -> NDArray[np.float64]:
    """[N, outputs]. Raises LabelsInvalid."""
    found = []
    for photo, words in lines_of(files, folder, ",".join(labels.names)):
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        if len(values) != len(labels.names) or not np.isfinite(values).all():
            expected = f"a number for each of {', '.join(labels.names)}"
            raise LabelsInvalid(f"{folder / LINES}: {photo} has {', '.join(words) or 'nothing'}; expected {expected}")
        found.append(values)
    return np.array(found, np.float64)


def measure(
    names: Sequence[str],
    session: ort.InferenceSession,
    images: ImageSet,
    limit: int | None = None,
    advance: Advance = lambda *_: None,
    baseline: Measured | None = None,
) -> Measured:
    """`mae`: mean absolute error, in the unit of the output; of several outputs that of each by its name.
    `skill`: 1 minus the ratio of the error to that of the best constant, the median of the targets. 1 is perfect, 0 is
    a guess. The mean over the outputs.

    With the `baseline` of the fp32 file also `agreement`: 1 minus the mean difference from that file's values, in
    standard deviations of these; of the output where it is lowest.
    """
    chosen = spread(len(images), limit)
    found, right = outputs_of(session, images, chosen, advance).astype(np.float64), images.labels[chosen]
    errors = np.abs(found - right).mean(axis=0)
    guesses = np.abs(right - np.median(right, axis=0)).mean(axis=0)
    called = ["mae"] if len(names) == 1 else [f"mae of {name}" for name in names]
    figures = dict(zip(called, errors.tolist(), strict=True))
    if guesses.all():  # the targets of every output differ
        figures["skill"] = float(np.mean(1 - errors / guesses))
    if baseline is not None and baseline.answers is not None:
        values = baseline.answers.classes
        apart, deviations = np.abs(found - values).mean(axis=0), values.std(axis=0)
        shares = np.divide(apart, deviations, out=(apart > 0).astype(np.float64), where=deviations > 0)
        figures["agreement"] = float(1 - shares.max())
    metrics = tuple(Metric(name=n, value=v, dataset=images.name, samples=len(chosen)) for n, v in figures.items())
    return Measured(metrics, Answers(found, right) if baseline is None else None)
