"""The highest rate that meets the objective: doubled until one misses, or ever faster down until one meets it, then
bisection. Pure: the caller measures."""

from __future__ import annotations

from collections.abc import Generator

# Requests per second that one place cannot send: a server that meets the objective there was not what was searched.
_HIGHEST_RATE = 1e6


def search(first: float, precision: float = 0.05, lowest: float = 0.1) -> Generator[float, bool, float]:
    """Yields rates to try, is sent whether each met the objective, returns the highest that did; 0 when none did.

    precision: how far, as a share, the answer may lie below a rate that was seen to miss. lowest: below it no rate is
    tried, unless `first` lies there. Where every rate up to a million per second met, the answer is the last of them
    and no rate was seen to miss.
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
            # Ever further: a first guess that is wrong by thousands costs a few steps, and so does a server that meets
            # the objective at no rate.
            missed, rate = rate, max(lowest, rate / 2**octaves)
            octaves *= 2
    while missed / met > 1 + precision:
        # The geometric middle: what is bisected is the ratio.
        middle = (met * missed) ** 0.5
        if (yield middle):
            met = middle
        else:
            missed = middle
    return met
