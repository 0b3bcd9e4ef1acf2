"""The highest rate that meets the objective, by doubling, then bisection. Pure: it asks, somebody else measures."""

from __future__ import annotations

from collections.abc import Generator

# Requests per second that one place cannot send: a server that meets the objective there was not what was searched.
_HIGHEST_RATE = 1e6
# More than a hundred times below the first guess is no search but a wrong guess.
_MAX_HALVINGS = 7


def search(first: float, precision: float = 0.05) -> Generator[float, bool, float]:
    """Yields rates to try, is sent whether each met the objective, returns the highest that did; 0 when none did.

    precision: how far, as a share, the answer may lie below a rate that was seen to miss. Where every rate up to a
    million per second met, the answer is the last of them and no rate was seen to miss.
    """
    met, missed, rate = 0.0, 0.0, first
    lowest = first / 2**_MAX_HALVINGS
    while not met or not missed:
        if (yield rate):
            met, rate = rate, rate * 2
            if not missed and rate > _HIGHEST_RATE:
                return met
        else:
            missed, rate = rate, rate / 2
            if not met and rate < lowest:
                return met
    while missed / met > 1 + precision:
        # The geometric middle: what is bisected is the ratio.
        middle = (met * missed) ** 0.5
        if (yield middle):
            met = middle
        else:
            missed = middle
    return met
