"""Answers of detectors, paired: order and a rare near tie do not matter, everything else does."""

from __future__ import annotations

import numpy as np

from rafaga.objects import paired
from rafaga.tensors import relative_error

Answer = tuple[np.ndarray, np.ndarray, np.ndarray]


def answer(objects: int) -> Answer:
    """One image with so many objects of at most 50, apart from each other, best first."""
    source = np.random.default_rng(0)
    boxes, scores, labels = np.zeros((1, 50, 4), np.float32), np.zeros((1, 50), np.float32), np.zeros((1, 50))
    corner = 20 * np.arange(objects, dtype=np.float32)
    boxes[0, :objects] = np.stack([corner, corner, corner + 9, corner + 9], 1)
    scores[0, :objects] = np.sort(source.uniform(0.1, 0.9, objects))[::-1]
    labels[0, :objects] = source.integers(1, 5, objects)
    return boxes, scores, labels


def error(found: Answer, reference: Answer) -> float:
    return max(relative_error(a, b) for a, b in zip(*paired(found, reference), strict=True))


def test_the_order_does_not_matter() -> None:
    for objects in (0, 1, 40):
        assert error(answer(objects), answer(objects)) == 0.0
    boxes, scores, labels = (part[:, [1, 0, 3, 2, *range(4, 50)]] for part in answer(40))
    assert error((boxes, scores, labels), answer(40)) == 0.0


def test_numbers_are_compared_as_ever() -> None:
    boxes, scores, labels = answer(40)
    assert 1e-4 < error((boxes, scores + np.float32(0.001) * (scores > 0), labels), (boxes, scores, labels)) < 1e-2


def test_one_in_twenty_may_be_another_one() -> None:
    boxes, scores, labels = answer(40)
    for missing, harmless in ((2, True), (3, False)):
        fewer = scores.copy()
        fewer[0, 40 - missing : 40] = 0
        assert (error((boxes, fewer, labels), (boxes, scores, labels)) == 0.0) == harmless
        assert (error((boxes, scores, labels), (boxes, fewer, labels)) == 0.0) == harmless


def test_other_labels_and_places_are_other_objects() -> None:
    boxes, scores, labels = answer(10)
    assert error((boxes, scores, labels % 4 + 1), (boxes, scores, labels)) > 0.1
    assert error((boxes + 5 * (scores > 0)[..., None], scores, labels), (boxes, scores, labels)) > 0.01
