"""Series and frames with one column of pandas, which is not imported here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy.typing as npt

from rafaga.errors import InvalidTensor


class Convertible(Protocol):
    """Series, frames with one column, tensors, numpy arrays."""

    def __array__(self) -> npt.NDArray[Any]: ...


SymbolsInput: TypeAlias = Sequence[str] | Convertible
"""A sequence of symbols from its beginning on; a string is one of its characters."""


def column(values: Any) -> Any:
    """The one column of a frame; anything else as it is. Raises InvalidTensor for a frame with several."""
    if not hasattr(values, "columns"):
        return values
    if len(values.columns) != 1:
        names = ", ".join(map(str, values.columns))
        raise InvalidTensor(f"expected one column, got a frame with {names or 'none'}: choose one, frame['NAME']")
    return values[values.columns[0]]
