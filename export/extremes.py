"""Inputs at the edges of what callers send: uniform, extreme and repeated. Many networks divide by a deviation."""

from __future__ import annotations

import numpy as np

from export.arrays import Array, Arrays, pad_symbols, pad_time, row_count, rows
from export.graph import ServingGraph
from export.samples import any_covariates
from export.verify import ParityCase
from models.entry import Entry, ImageInput
from rafaga.bundle import ForecastSpec, Task

_FREE_SIZE = (64, 96)
_LONGEST = 100


def extremes(entry: Entry) -> tuple[tuple[str, ...], Arrays]:
    """A name for each row, and the rows."""
    if isinstance(entry.input, ImageInput):
        return _images(entry.input)
    if isinstance(entry.input, ForecastSpec):
        shape = entry.input
        length = min(shape.max_history, max(shape.min_history, _LONGEST))
        ones = np.ones(length)
        named: dict[str, Array] = {
            "a series of zeros": 0 * ones,
            "a constant series": 100 * ones,
            "a constant series again": 100 * ones,
            "a constant series of the shortest length": 100 * ones[: shape.min_history],
            "a series of two values": 100 + np.arange(length) % 2,
            "a series around a million": 1e6 + np.arange(length),
        }
        histories = list(named.values())
        return tuple(named), pad_time(histories, any_covariates(shape, histories, np.random.default_rng(0)))
    longest = min(entry.input.max_length, _LONGEST)
    symbols = {
        "one symbol": np.zeros(1, np.int64),
        "the last symbol, repeated": np.full(longest, len(entry.labels()) - 1),
        "the first symbol, repeated": np.zeros(longest, np.int64),
    }
    return tuple(symbols), pad_symbols(list(symbols.values()))


def _images(image: ImageInput) -> tuple[tuple[str, ...], Arrays]:
    shape = (image.height or _FREE_SIZE[0], image.width or _FREE_SIZE[1], image.channels)
    chessboard = np.indices(shape[:2]).sum(0)[..., np.newaxis] % 2 * np.ones(shape)
    named = {
        "a black image": np.zeros(shape),
        "a white image": np.full(shape, 255),
        "a grey image": np.full(shape, 128),
        "a grey image again": np.full(shape, 128),
        "an image of one colour": np.broadcast_to([200, 50, 10][: image.channels], shape),
        "an image of black and white pixels": 255 * chessboard,
    }
    return tuple(named), {"image": np.stack(list(named.values())).astype(np.uint8)}


def finite_part(entry: Entry, graph: ServingGraph) -> tuple[ParityCase | None, tuple[str, ...]]:
    """The extremes for which PyTorch's answers are finite, as a case, and the names of the others.

    A detector's case is None: in a uniform image all places score alike, and rounding decides which boxes are kept.
    """
    names, inputs = extremes(entry)
    answers = graph.reference(inputs)
    finite = np.ones(row_count(inputs), dtype=bool)
    for output in answers.values():
        finite &= np.isfinite(output).reshape(len(output), -1).all(axis=1)
    kept = np.flatnonzero(finite).tolist()
    case = ParityCase(rows(inputs, kept), rows(answers, kept)) if kept and entry.task is not Task.DETECTION else None
    return case, tuple(name for name, good in zip(names, finite, strict=True) if not good)
