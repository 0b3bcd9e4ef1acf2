"""What is printed: aligned tables for people, one JSON document for machines."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from rafaga import ModelInfo, Timing
from rafaga.cli._errors import complain

Cell = str | int | float


class Figure(str):
    """A number that is formatted already."""

    __slots__ = ()


def table(headings: Sequence[str], rows: Sequence[Sequence[Cell]], fitting: int | None = None) -> str:
    """Columns two spaces apart, numbers to the right; floats with six digits at most.

    fitting: the width to fit; the column with the longest text loses the beginnings of its texts for it.
    """
    numeric = [
        all(isinstance(row[i], int | float | Figure) or row[i] == "" for row in rows) for i in range(len(headings))
    ]
    cells = [list(headings), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(headings))]
    excess = sum(widths) + 2 * (len(widths) - 1) - fitting if fitting else 0
    if excess > 0:
        longest = widths.index(max(widths))
        widths[longest] = max(widths[longest] - excess, len(headings[longest]), 8)
    return "\n".join(
        "  ".join(
            _cut(cell, width).rjust(width) if right else _cut(cell, width).ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def width() -> int | None:
    """Columns of the terminal; None where another program reads."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def show_table(headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    print(table(headings, rows, width()))


def show_json(value: Any) -> None:
    print(as_json(value))


def show_footer(model: ModelInfo, timing: Timing) -> None:
    """Which model answered, where the time went, and whether the answer means anything."""
    print(
        f"\n{model}: queued {timing.queue_us} µs, prepared {timing.preprocess_us} µs, "
        f"ran {timing.inference_us} µs in a batch of {timing.batch_size}"
    )


def warn_if_untrained(model: ModelInfo) -> None:
    if not model.trained:
        complain(f"{model.name} has random weights: its answers are meaningless")


def as_json(value: Any) -> str:
    """Dataclasses become objects, arrays lists."""
    return json.dumps(value, default=_plain, ensure_ascii=False)


def wrapped(label: str, text: str) -> str:
    """Further lines are indented as far as the label."""
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.fill(label + text, width, subsequent_indent=" " * (len(label) or 2), break_long_words=False)


def _cut(text: str, width: int) -> str:
    """The end says more of a path than its beginning."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def _text(cell: Cell) -> str:
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no JSON form")
