"""Matches two answers of a detector, so that they can be compared number by number.

Which of two overlapping boxes survives, and their order, depends on the last bit where scores are nearly equal.
Processors and batch sizes round differently: up to one object in twenty may differ without an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Objects are the same where label, place and score are: rounding moves a box by far less.
_PIXELS, _SCORE = 1.0, 0.01
_OTHERS = 0.05


def paired(found: Sequence[Array], reference: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """The objects that both answers have, in the order of `reference`: boxes [K, 4], scores [K] and labels [K] of each.

    Both are boxes [N, D, 4], scores [N, D] and labels [N, D], where a score of zero means no object. If they
    disagree about more than one object in twenty, they are returned unchanged.
    """
    pairs = [
        (image, theirs, ours)
        for image in range(len(reference[1]))
        for theirs, ours in _pairs([a[image] for a in found], [b[image] for b in reference])
    ]
    most = max(int((found[1] > 0).sum()), int((reference[1] > 0).sum()))
    if most - len(pairs) > math.ceil(_OTHERS * most):
        return list(found), list(reference)
    images, theirs, ours = np.array(pairs, dtype=np.int64).reshape(-1, 3).T
    return [a[images, theirs] for a in found], [b[images, ours] for b in reference]


def _pairs(found: Sequence[Array], reference: Sequence[Array]) -> list[tuple[int, int]]:
    """Rows of one image: for each object of the reference, in order, the nearest of the same label that is left."""
    boxes, scores, labels = found
    left = set(np.flatnonzero(scores > 0).tolist())
    pairs = []
    for row in np.flatnonzero(reference[1] > 0).tolist():
        same = [at for at in left if labels[at] == reference[2][row] and abs(scores[at] - reference[1][row]) <= _SCORE]
        distance = {at: float(np.abs(boxes[at] - reference[0][row]).max()) for at in same}
        nearest = min(distance, key=lambda at: distance[at], default=None)
        if nearest is not None and distance[nearest] <= _PIXELS:
            left.remove(nearest)
            pairs.append((nearest, row))
    return pairs
