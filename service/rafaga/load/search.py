"""Searches the highest rate that meets the objective: doubles it until one misses, or lowers it in growing steps until
one meets it, then bisects. Pure: the caller measures."""

from __future__ import annotations

from collections.abc import Generator

# More requests per second than one machine can send: beyond this rate the search gives up.
_HIGHEST_RATE = 1e6


def search(first: float, precision: float = 0.05, lowest: float = 0.1) -> Generator[float, bool, float]:
    """Yields rates to try, is sent whether each met the objective, returns the highest that did; 0 when none did.

    precision: how far, as a share, the answer may lie below a rate that missed. lowest: no lower rate is tried, except
    `first`. If every rate up to a million per second met the objective, the answer is the last one tried, and no rate
    missed.
    """
    met, missed, rate = 0.0, 0.0, first
    lowest, octaves = min(lowest, first), 1
    while not met or not missed:
        if (yield rate):
            met, rate = rate, rate * 2
            if not missed and rate > _HIGHEST_RATE:
                return met
        elif rate == lowest and not met:
            return met
        else:
            # In growing steps: a first guess that is wrong by a factor of thousands costs only a few of them, and so
            # does a server that meets the objective at no rate.
            missed, rate = rate, max(lowest, rate / 2**octaves)
            octaves *= 2
    while missed / met > 1 + precision:
        # The geometric mean, because precision is a ratio.
        middle = (met * missed) ** 0.5
        if (yield middle):
            met = middle
        else:
            missed = middle
    return met
