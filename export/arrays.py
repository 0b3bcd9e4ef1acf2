"""Named arrays: a graph's inputs and outputs by tensor name."""

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


def pad_time(histories: Sequence[Array], covariates: Sequence[Array] = ()) -> dict[str, Array]:
    """A forecaster's inputs: `history` float32 [N, T] right-padded with zeros, `length` int64 [N]. With `covariates` of
    the history and the horizon after it, [T + horizon, C] each, also `past_covariates` float32 [N, T, C], padded
    likewise, and `future_covariates` float32 [N, horizon, C].
    """
    inputs = _padded("history", histories, np.float32)
    if covariates:
        split = [
            (known[: len(history)], known[len(history) :]) for history, known in zip(histories, covariates, strict=True)
        ]
        inputs["past_covariates"] = _padded("", [past for past, _ in split], np.float32)[""]
        inputs["future_covariates"] = np.stack([future for _, future in split]).astype(np.float32)
    return inputs


def pad_symbols(sequences: Sequence[Array]) -> dict[str, Array]:
    """A next-symbol model's inputs: `symbols` int64 [N, T] right-padded with zeros, `length` int64 [N]."""
    return _padded("symbols", sequences, np.int64)


def alone(inputs: Arrays, row: int) -> dict[str, Array]:
    """One row as its own batch, without padding."""
    single = rows(inputs, slice(row, row + 1))
    if "length" in single:
        length = int(single["length"][0])
        padded = single.keys() - {"length", "future_covariates"}
        single |= {name: single[name][:, :length] for name in padded}
    return single


def _padded(name: str, sequences: Sequence[Array], dtype: type[np.generic]) -> dict[str, Array]:
    length = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    padded = np.zeros((len(sequences), int(length.max()), *np.shape(sequences[0])[1:]), dtype=dtype)
    for row, values in zip(padded, sequences, strict=True):
        row[: len(values)] = values
    return {name: padded, "length": length}
