"""What is printed: aligned tables for people, one JSON document for machines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np


def table(headings: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
    """Columns two spaces apart, numbers to the right. Cells are printed as given; floats with six digits at most."""
    numeric = [all(isinstance(row[i], int | float) or row[i] == "" for row in rows) for i in range(len(headings))]
    cells = [list(headings), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def as_json(value: Any) -> str:
    """Dataclasses become objects, arrays lists."""
    return json.dumps(value, default=_plain, ensure_ascii=False)


def _text(cell: str | int | float) -> str:
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no JSON form")
