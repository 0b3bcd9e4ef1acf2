"""Measurements taken in interleaved blocks, and how they are written down."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def interleaved(measures: dict[Key, Callable[[], Value]], blocks: int) -> dict[Key, list[Value]]:
    """Every measure once per block, forwards and backwards in turn: A-B-B-A, so that a machine that drifts drifts for
    all of them."""
    results: dict[Key, list[Value]] = {key: [] for key in measures}
    for block in range(blocks):
        for key in list(measures)[:: 1 if block % 2 == 0 else -1]:
            results[key].append(measures[key]())
            print(f"block {block + 1}/{blocks}  {key}  {results[key][-1]}", flush=True)
    return results


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median and range: "1,236 (1,204–1,310)"."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def ratios(values: Sequence[float], bases: Sequence[float]) -> list[float]:
    """Block by block, because two figures of one block had the machine in the same state."""
    return [value / base for value, base in zip(values, bases, strict=True)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
