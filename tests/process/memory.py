"""Whether a process grows: resident memory over time, and the one judgement that every soak goes by."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

MIB = 2**20
LIMIT_BYTES = 6 * MIB
"""What the second half of a soak may add: caches that fill, arenas of threads that come late."""


def growth(readings: Sequence[float]) -> float:
    """What the second half of evenly spaced readings added, by the median slope between pairs (Theil-Sen): neither a
    reading that is off nor the way up in the first half counts."""
    half = np.asarray(readings[len(readings) // 2 :], np.float64)
    if len(half) < 8:
        raise ValueError(f"expected 16 readings or more, got {len(readings)}")
    first, second = np.triu_indices(len(half), k=1)
    return float(np.median((half[second] - half[first]) / (second - first)) * (len(half) - 1))


def grows(resident: Sequence[float]) -> bool:
    return growth(resident) > LIMIT_BYTES


@contextmanager
def watching(reading: Callable[[], float], every_s: float) -> Iterator[list[float]]:
    """The lowest of every ten readings, until the end of the block: what a call takes for a moment does not count."""
    readings: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        ten: list[float] = []
        while not stop.wait(every_s / 10):
            ten.append(reading())
            if len(ten) == 10:
                readings.append(min(ten))
                ten.clear()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield readings
    finally:
        stop.set()
        thread.join()
