"""Recorded traffic: when requests came and, if recorded, for which model and with how many rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rafaga.load import schedule
from rafaga.load.schedule import MixEntry, Schedule, Times

# In the place of a model or of rows: the mix decides.
_ANY = "-"
_EXPECTED = f"expected SECONDS [MODEL [ROWS]], {_ANY} for a model or rows that the mix decides"


class TraceError(Exception):
    """Not a trace, or a line that no request of the mix fits."""


@dataclass(frozen=True)
class LineKind:
    """What lines of a trace ask for. None: the mix decides."""

    model: str | None = None
    rows: int | None = None

    def fits(self, choice: MixEntry) -> bool:
        if self.model not in (None, choice.model):
            return False
        return choice.drawn if self.rows is None else choice.rows == self.rows

    def __str__(self) -> str:
        return f"{self.rows or 'any'} rows for {self.model or 'any model'}"


@dataclass(frozen=True)
class Trace:
    """due_s: seconds, rising from zero. kind: of each arrival, its place in `kinds`."""

    due_s: Times
    kind: NDArray[np.int64]
    kinds: tuple[LineKind, ...]

    @property
    def models(self) -> list[str | None]:
        """All models that lines name, and None if some lines name no model."""
        return list(dict.fromkeys(kind.model for kind in self.kinds))

    def rows(self, model: str) -> set[int]:
        """The numbers of rows that lines request of `model`."""
        return {kind.rows for kind in self.kinds if kind.rows is not None and kind.model in (None, model)}

    def schedule(self, choices: Sequence[MixEntry], seed: int) -> Schedule:
        """Which request is sent for each line: one of those that fit, by weight. Raises TraceError."""
        rng = np.random.default_rng([seed, 1])
        request = np.empty(len(self.kind), np.int64)
        for index, kind in enumerate(self.kinds):
            weights = [choice.weight if kind.fits(choice) else 0.0 for choice in choices]
            if not any(weights):
                raise TraceError(f"--trace asks for {kind}; only models of images take several rows in a request")
            lines = self.kind == index
            request[lines] = schedule.mix(weights, int(lines.sum()), rng)
        return Schedule(self.due_s, request)


def read(path: Path) -> Trace:
    """Lines may use any clock and be in any order; the earliest is due at zero. Raises TraceError or OSError."""
    times: list[float] = []
    kinds: dict[LineKind, int] = {}
    which: list[int] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith("#"):
            continue
        try:
            at_s, kind = _line(words)
        except ValueError:
            raise TraceError(f"--trace {path}, line {number}: {line.strip()!r}; {_EXPECTED}") from None
        times.append(at_s)
        which.append(kinds.setdefault(kind, len(kinds)))
    if len(times) < 2:
        raise TraceError(f"--trace {path}: expected at least two lines")
    at_s_of = np.asarray(times)
    order = np.argsort(at_s_of, kind="stable")
    return Trace(at_s_of[order] - at_s_of[order[0]], np.asarray(which, np.int64)[order], tuple(kinds))


def _line(words: Sequence[str]) -> tuple[float, LineKind]:
    """Raises ValueError."""
    at_s, model, rows, *beyond = [*words, *[_ANY] * (3 - len(words))]
    count = None if rows == _ANY else int(rows)
    if beyond or not np.isfinite(float(at_s)) or (count is not None and count < 1):
        raise ValueError
    return float(at_s), LineKind(None if model == _ANY else model, count)
