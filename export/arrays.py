"""Named arrays: what goes into a graph and what comes out of it, by tensor name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]


def rows(arrays: Arrays, index: Sequence[int] | slice) -> dict[str, Array]:
    """The given rows of every array."""
    return {name: array[index] for name, array in arrays.items()}


def row_count(arrays: Arrays) -> int:
    return len(next(iter(arrays.values())))


def pad_time(histories: Sequence[Array]) -> dict[str, Array]:
    """A forecaster's inputs: `history` float32 [N, T] right-padded with zeros, `length` int64 [N]."""
    length = np.array([len(history) for history in histories], dtype=np.int64)
    history = np.zeros((len(histories), int(length.max())), dtype=np.float32)
    for row, values in zip(history, histories, strict=True):
        row[: len(values)] = values
    return {"history": history, "length": length}


def alone(inputs: Arrays, row: int) -> dict[str, Array]:
    """One row as its own batch, without the padding that its company needed."""
    single = rows(inputs, slice(row, row + 1))
    if "length" in single:
        single["history"] = single["history"][:, : int(single["length"][0])]
    return single
