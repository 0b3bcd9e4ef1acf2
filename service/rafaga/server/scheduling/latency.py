"""How long one run of a model takes, by rows in the batch: measured at warm-up, corrected by every later run."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

# What a batch costs besides the model's run: forming it, splitting the answers, replying. A first estimate, which runs
# correct. Without it a 50 µs model would look as efficient in batches of one as in batches of 32.
DISPATCH_S = 300e-6
# One slow run (a page fault, a neighbour) moves the estimate by a tenth of its excess, and counts at most threefold.
_SMOOTHING = 0.1
_CLIP = 3.0
# Sizes that do not run follow the others this slowly. An estimate that is too high after a slow period would otherwise
# never be corrected: requests predicted to be too slow are refused and do not run.
_DRIFT = 0.01
# A batch is large enough once it reaches this share of the best throughput: more rows would wait longer, and be late
# together when a run takes longer than predicted. Most large models on CPUs gain nothing from batches, and noise makes
# some size look a few per cent faster: noise must not select large batches.
_ENOUGH = 0.95


def buckets_up_to(max_batch_size: int) -> tuple[int, ...]:
    """Powers of two below `max_batch_size`, and itself: the batch sizes that are run and measured at warm-up."""
    powers = [1 << k for k in range(max_batch_size.bit_length()) if 1 << k < max_batch_size]
    return (*powers, max_batch_size)


class LatencyTable:
    """Predicted seconds per run; linear between the measured batch sizes, or `stepped` where rows are padded to them.

    `cost` relates a batch to the warm-up inputs: twice the pixels or time steps, twice the cost. Models scale
    differently, so every octave of cost is corrected by its own runs alone.

    `efficient_rows` is the smallest measured batch size whose throughput is within 5 % of the best. It stays as warm-up
    measured it, because only there all sizes ran under equal conditions.
    """

    def __init__(self, buckets: Sequence[int], seconds: Sequence[float], stepped: bool = False) -> None:
        if not buckets or len(buckets) != len(seconds) or any(a >= b for a, b in pairwise(buckets)):
            raise ValueError("expected rising buckets and as many measurements")
        self.buckets = tuple(buckets)
        self._stepped = stepped
        self._measured = tuple(max(s, 1e-6) for s in seconds)
        self._by_octave: dict[int, list[float]] = {}  # as `_measured`, at cost 1, for each octave of cost that was run
        self._spread = 0.0
        throughput = [b / s for b, s in zip(self.buckets, self._measured, strict=True)]
        self._efficient = next(i for i, t in enumerate(throughput) if t >= _ENOUGH * max(throughput))
        self.efficient_rows = self.buckets[self._efficient]

    @property
    def spread(self) -> float:
        """How far runs deviate from their prediction: mean |taken / predicted - 1|."""
        return self._spread

    def predict(self, rows: int, cost: float = 1.0) -> float:
        """Seconds for one run over `rows`; more rows than the largest bucket take several runs."""
        seconds = self._by_octave.get(_octave(cost), self._measured)
        runs, rest = divmod(rows, self.buckets[-1])
        return (runs * seconds[-1] + (self._between(seconds, rest) if rest else 0.0)) * cost

    def full_s(self, cost: float = 1.0) -> float:
        """Seconds for one run over `efficient_rows`."""
        return self._by_octave.get(math.frexp(cost)[1], self._measured)[self._efficient] * cost

    def efficient_s(self, rows: int, cost: float = 1.0) -> float:
        """Seconds for `rows` in batches of the efficient size."""
        batches, rest = divmod(rows, self.efficient_rows)
        return batches * self.full_s(cost) + (self.predict(rest, cost) if rest else 0.0)

    def rows_run(self, rows: int) -> int:
        """The size that a batch of `rows` is padded to."""
        return self.buckets[bisect_left(self.buckets, rows)] if self._stepped and rows < self.buckets[-1] else rows

    def observe(self, rows: int, seconds: float, cost: float = 1.0) -> None:
        """Corrects the two buckets around `rows` by what a run took."""
        expected = self.predict(rows, cost)
        ratio = min(max(seconds / expected, 1 / _CLIP), _CLIP)
        self._spread += _SMOOTHING * (abs(ratio - 1) - self._spread)
        factor = 1 + _SMOOTHING * (ratio - 1)
        slowness = factor * expected / (self._between(self._measured, rows) * cost)  # compared to warm-up
        octave, right = _octave(cost), bisect_left(self.buckets, rows)
        alone = self._stepped or self.buckets[right] == rows
        corrected = range(right if alone else max(0, right - 1), right + 1)
        self._by_octave.setdefault(octave, list(self._measured))
        for other, times in self._by_octave.items():
            for i, measured in enumerate(self._measured):
                if other != octave:
                    times[i] += _DRIFT * (measured - times[i])
                elif i in corrected:
                    times[i] *= factor
                else:
                    times[i] += _DRIFT * (measured * slowness - times[i])

    def _between(self, seconds: Sequence[float], rows: int) -> float:
        right = bisect_left(self.buckets, rows)
        high = self.buckets[right]
        if high == rows or right == 0 or self._stepped:
            return seconds[right]
        low = self.buckets[right - 1]
        share = (rows - low) / (high - low)
        return seconds[right - 1] * (1 - share) + seconds[right] * share


def _octave(cost: float) -> int:
    return math.frexp(cost)[1]
