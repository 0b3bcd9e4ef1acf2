"""When requests are due, and which: decided before the first one is sent, by pure functions of a seed.

Nothing the server does moves a schedule; that is what makes the loop open. Times are seconds relative to the start of
the measured window; those of the warm-up are negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]


class Pattern(StrEnum):
    """How requests come."""

    POISSON = "poisson"
    CONSTANT = "constant"
    TRACE = "trace"
    CLOSED = "closed"  # callers that wait for each answer: no schedule at all


@dataclass(frozen=True)
class SchedulePart:
    """Share `index` (from 0) of `of` shares of a schedule. Together they contain each request once."""

    index: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise ValueError(f"expected a part from 1 to {self.of}, got {self.index + 1}")

    def split(self, index: int, of: int) -> SchedulePart:
        """Share `index` of `of` of this share."""
        return SchedulePart(index * self.of + self.index, of * self.of)

    def take(self, count: int) -> int:
        """This share of `count` indivisible things, for example callers."""
        return (count - self.index + self.of - 1) // self.of if count > self.index else 0


@dataclass(frozen=True)
class Schedule:
    """due_s: rising. request: which one is due then, by its place in the mix."""

    due_s: Times
    request: NDArray[np.int64]

    def share(self, part: SchedulePart) -> Schedule:
        """Every `part.of`-th request, so that all shares have the same rate at any time."""
        return Schedule(self.due_s[part.index :: part.of], self.request[part.index :: part.of])


@dataclass(frozen=True)
class MixEntry:
    """A request of the mix. weight: how often it is drawn. drawn: False if only a trace names it."""

    model: str
    rows: int
    weight: float
    drawn: bool = True


def poisson(rate: float, begin_s: float, end_s: float, rng: np.random.Generator) -> Times:
    """Independent callers, `rate` requests per second on average.

    Given their number, which is Poisson-distributed, the arrivals of a Poisson process are independent and uniform
    (the order-statistics property: Ross, Stochastic Processes, theorem 2.3.1).
    """
    return np.sort(rng.uniform(begin_s, end_s, rng.poisson(rate * (end_s - begin_s))))


def constant(rate: float, begin_s: float, end_s: float) -> Times:
    """Evenly spaced, one of them at zero."""
    return np.arange(np.ceil(begin_s * rate), np.ceil(end_s * rate)) / rate


def ramp(first: float, last: float, steps: int) -> tuple[float, ...]:
    """Rates from `first` to `last`, evenly spaced."""
    return tuple(np.linspace(first, last, steps).tolist())


def mix(weights: Sequence[float], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` independent draws of a request of the mix, by weight."""
    shares = np.asarray(weights, np.float64)
    return rng.choice(len(shares), size=count, p=shares / shares.sum())
