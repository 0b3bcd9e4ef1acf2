"""Figures as Markdown tables that can be read in a terminal too."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def spread(values: Sequence[float], digits: int | None = None) -> str:
    """Median and range, "1,236 (1,204–1,310)"; a dash where nothing was measured.

    digits: after the point; by default as many as show three significant ones of the median.
    """
    if not values:
        return "–"
    middle = statistics.median(values)
    if digits is None:
        digits = max(0, 2 - math.floor(math.log10(abs(middle)))) if middle else 0
    shown = f"{middle:,.{digits}f}"
    return f"{shown} ({min(values):,.{digits}f}–{max(values):,.{digits}f})" if len(values) > 1 else shown


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        widths = [max(map(len, cells)) for cells in zip(self.head, *self.rows, strict=True)]
        lines = [self.head, ["-" * width for width in widths], *self.rows]
        padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in padded)
