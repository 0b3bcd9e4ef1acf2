"""How long one run of a model takes, by rows in the batch: measured at warm-up, corrected by every run since."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

# What a batch costs beside the model's own run: forming it, splitting the answers, replying. Without it a model of
# 50 µs would look as efficient in batches of one as in batches of 32.
DISPATCH_S = 300e-6
# One slow run (a page fault, a neighbour) moves the estimate by a tenth of its excess, and counts at most fourfold.
_SMOOTHING = 0.1
_CLIP = 4.0
# A batch is large enough once it reaches this share of the best throughput: more rows would only add waiting.
_ENOUGH = 0.98


def buckets_up_to(max_batch_size: int) -> tuple[int, ...]:
    """Powers of two below `max_batch_size`, and itself: the batch sizes that are warmed and measured."""
    powers = [1 << k for k in range(max_batch_size.bit_length()) if 1 << k < max_batch_size]
    return (*powers, max_batch_size)


class LatencyTable:
    """Predicted seconds per run; linear between the measured batch sizes.

    `cost` relates a batch to the warm-up inputs: twice the pixels or time steps, twice the cost.
    """

    def __init__(self, buckets: Sequence[int], seconds: Sequence[float]) -> None:
        if len(buckets) != len(seconds) or any(a >= b for a, b in pairwise(buckets)):
            raise ValueError("expected rising buckets and as many measurements")
        self._buckets = tuple(buckets)
        self._seconds = [max(s, 1e-6) for s in seconds]

    @property
    def buckets(self) -> tuple[int, ...]:
        return self._buckets

    def predict(self, rows: int, cost: float = 1.0) -> float:
        """Seconds for one run over `rows`; more rows than the largest bucket take several runs."""
        largest = self._buckets[-1]
        runs, rest = divmod(rows, largest)
        seconds = runs * self._seconds[-1]
        if rest:
            right = bisect_left(self._buckets, rest)
            seconds += self._between(right, rest)
        return seconds * cost

    def observe(self, rows: int, seconds: float, cost: float = 1.0) -> None:
        """Corrects the two buckets around `rows` by what a run really took."""
        expected = self.predict(rows, cost)
        ratio = min(max(seconds / expected, 1 / _CLIP), _CLIP)
        right = bisect_left(self._buckets, rows)
        factor = 1 + _SMOOTHING * (ratio - 1)
        self._seconds[right] *= factor
        if right and self._buckets[right] != rows:
            self._seconds[right - 1] *= factor

    @property
    def efficient_rows(self) -> int:
        """The smallest measured batch size whose throughput is within 2 % of the best."""
        throughput = [b / (s + DISPATCH_S) for b, s in zip(self._buckets, self._seconds, strict=True)]
        best = max(throughput)
        return next(b for b, t in zip(self._buckets, throughput, strict=True) if t >= _ENOUGH * best)

    def _between(self, right: int, rows: int) -> float:
        high = self._buckets[right]
        if high == rows or right == 0:
            return self._seconds[right]
        low = self._buckets[right - 1]
        share = (rows - low) / (high - low)
        return self._seconds[right - 1] * (1 - share) + self._seconds[right] * share
