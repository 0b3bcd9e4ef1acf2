"""How long everything is measured, and who says so: the real run and the quick one differ in nothing else."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from bench.records import Block, Record
from bench.verdicts import Verdict

_SHORTEST_S = 0.2


@dataclass(frozen=True)
class Plan:
    """blocks: repetitions of everything. scale: of the windows' lengths. quick: the fewest models and loads, to see
    that it works; its figures are worth nothing."""

    blocks: int = 5
    scale: float = 1.0
    quick: bool = False

    def seconds(self, whole_s: float) -> float:
        return max(_SHORTEST_S, self.scale * whole_s)


QUICK = Plan(blocks=1, scale=0.3, quick=True)


@dataclass(frozen=True)
class Task:
    """What a part needs to be measured. note: hears a fact that belongs beside the figures, a sentence of Markdown."""

    repository: Path
    plan: Plan
    note: Callable[[str], None]


Measure: TypeAlias = Callable[[Task], Generator[Block, None, None]]


@dataclass(frozen=True)
class Part:
    """What is measured, kept and repeated as one. budget_s: how long it takes when nothing goes wrong. open_loads: the
    loads whose requests come at times of their own; under the others callers wait for their answers."""

    name: str
    budget_s: Callable[[Plan], float]
    measure: Measure
    open_loads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """Parts that share tables on the page. Records come in any number, those of some parts may lack."""

    name: str
    parts: tuple[Part, ...]
    tables: Callable[[Sequence[Record]], str]
    verdicts: Callable[[Sequence[Record]], list[Verdict]]
