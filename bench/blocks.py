"""What a section is, and how its cells are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from bench.tables import Table

Figures: TypeAlias = dict[str, float]
"""One measurement. Units are in the names; a rate is rows per second."""

Cells: TypeAlias = Mapping[str, Callable[[], Figures]]
"""What is measured, by name: "MODEL/CALLERS/SERVER"."""

Blocks: TypeAlias = list[dict[str, Figures]]
"""Every cell once per block."""


@dataclass(frozen=True)
class Plan:
    """seconds: of one measurement. baseline: another checkout of this project, measured in the same blocks."""

    blocks: int
    seconds: float
    repository: Path
    device: str = "cpu"
    baseline: Path | None = None


class Section(Protocol):
    """A module with these two functions."""

    def cells(self, plan: Plan) -> AbstractContextManager[Cells]:
        """Starts the servers, which run until the block ends."""

    def tables(self, blocks: Blocks) -> Sequence[Table]: ...


def interleaved(cells: Cells, blocks: int) -> Iterator[dict[str, Figures]]:
    """Measures every cell once per block, forwards and backwards in turn: A-B-B-A."""
    for number in range(blocks):
        block = {}
        for name in list(cells)[:: 1 if number % 2 == 0 else -1]:
            block[name] = cells[name]()
            shown = ", ".join(f"{key} {value:,.4g}" for key, value in block[name].items())
            print(f"  {number + 1}/{blocks} {name}: {shown}", flush=True)
        yield block


def column(blocks: Blocks, cell: str, figure: str) -> list[float]:
    """A figure block by block; empty for a cell that was not measured."""
    return [block[cell][figure] for block in blocks if cell in block]


def ratios(blocks: Blocks, cell: str, base: str, figure: str = "rate") -> list[float]:
    """Block by block: two figures of one block found the machine in the same state."""
    pairs = zip(column(blocks, cell, figure), column(blocks, base, figure), strict=False)
    return [value / below for value, below in pairs if below]


def parts(blocks: Blocks, at: int) -> list[str]:
    """The different parts `at` one place of the cells' names, in the order of the first block."""
    names = [name.split("/")[at] for name in blocks[0]]
    return list(dict.fromkeys(names))
