"""NaN and infinity among a model's outputs: a number that means nothing, which a caller would take for an answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rafaga.errors import NonFiniteOutput
from rafaga.server.scheduling.job import Arrays

_MOST_LISTED = 5


def finite(outputs: Arrays) -> bool:
    """Integers always are."""
    return all(o.dtype.kind != "f" or bool(np.isfinite(o).all()) for o in outputs)


def non_finite_output(outputs: Arrays, names: tuple[str, ...], numbers: NDArray[np.integer]) -> NonFiniteOutput | None:
    """The error for a caller whose rows have such `outputs`; None: all are finite. numbers: of the rows in the
    request."""
    for name, output in zip(names, outputs, strict=True):
        if not finite((output,)):
            bad = np.sort(numbers[~np.isfinite(output).reshape(len(output), -1).all(axis=1)])
            rows = ", ".join(map(str, bad[:_MOST_LISTED].tolist())) + (", …" if len(bad) > _MOST_LISTED else "")
            return NonFiniteOutput(
                f"the model's output {name} is NaN or infinite for row {rows} of this input: the model does not "
                f"support it (often an input of equal values)"
            )
    return None
