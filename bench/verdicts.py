"""What was to be reached, and whether it was: decided here from the figures, never by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Aim:
    bound: float
    at_least: bool = True

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"

    def met_by(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True)
class Case:
    """One figure against its aim. middle: the median of the blocks, or the figure of all of them together; NaN, which
    meets no aim, where there is none."""

    name: str
    aim: Aim
    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, name: str, aim: Aim, values: Sequence[float], middle: float | None = None) -> Case:
        """values: block by block; NaN in those that gave none. middle: their median where not given."""
        known = [value for value in values if not math.isnan(value)] or [math.nan]
        return cls(name, aim, statistics.median(known) if middle is None else middle, min(known), max(known))

    @property
    def reached(self) -> bool:
        return self.aim.met_by(self.middle)

    def shown(self) -> str:
        """As many digits as it takes to be on the right side of the bound: 1.396 is not 1.40 where that misses."""
        digits = 2
        while digits < 6 and self.aim.met_by(float(f"{self.middle:.{digits}f}")) != self.reached:
            digits += 1
        return f"{self.middle:.{digits}f}" if not math.isnan(self.middle) else "no answer"

    def measured(self) -> str:
        return f"{self.shown()} ({self.low:.2f}–{self.high:.2f})" if not math.isnan(self.middle) else "no answer"

    def missed(self) -> str:
        """ "1.22 of 1.4" """
        return f"{self.shown()} of {'' if self.aim.at_least else 'at most '}{self.aim.bound:g}"


@dataclass(frozen=True)
class Verdict:
    """A row of the table of aims. where: around a case's name, "at {} callers". beside: what else belongs to it."""

    what: str
    cases: tuple[Case, ...]
    where: str = "{}"
    beside: str = ""

    @property
    def reached(self) -> bool:
        return bool(self.cases) and all(case.reached for case in self.cases)

    def found(self) -> str:
        """ "reached", "reached at 1 and 8 callers; not reached at 32: 1.22 of 1.6", "not reached: 2.4 of 2.5" """
        if not self.cases:
            return "not measured"
        if self.reached:
            return "reached"
        met = [case.name for case in self.cases if case.reached]
        missed = [case for case in self.cases if not case.reached]
        before = self.where.partition("{}")[0]
        misses = [f"{before}{case.name}: {case.missed()}" for case in missed]
        if not self.cases[0].name:
            return f"**not reached**: {missed[0].missed()}"
        first = f"reached {self.where.format(_listed(met))}; " if met else ""
        return f"{first}**not reached** {', '.join(misses)}"

    def cells(self) -> tuple[str, ...]:
        aims = list(dict.fromkeys(str(case.aim) for case in self.cases))
        measured = (": ".join(filter(None, (case.name, case.measured()))) for case in self.cases)
        return (self.what, ", ".join(aims), " · ".join(measured), self.found(), self.beside)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


HEAD = ("", "aim", "median (range)", "", "beside it")
