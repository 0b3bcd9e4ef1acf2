"""The highest rate that meets the objective, by doubling, then bisection. Pure: it asks, somebody else measures."""

from __future__ import annotations

from collections.abc import Generator

# More than a hundred times up or down from the first guess is no search but a wrong guess.
_MAX_DOUBLINGS = 8


def search(first: float, precision: float = 0.05) -> Generator[float, bool, float]:
    """Yields rates to try, is sent whether each met the objective, returns the highest that did; 0 when none did.

    precision: how far, as a share, the answer may lie below a rate that was seen to miss.
    """
    met, missed, rate = 0.0, 0.0, first
    for _ in range(_MAX_DOUBLINGS):
        if (yield rate):
            met, rate = rate, rate * 2
        else:
            missed, rate = rate, rate / 2
        if met and missed:
            break
    if not met or not missed:
        return met
    while missed / met > 1 + precision:
        # The geometric middle: what is bisected is the ratio.
        middle = (met * missed) ** 0.5
        if (yield middle):
            met = middle
        else:
            missed = middle
    return met
