"""Distributions of microseconds as HDR histograms: of fixed size, mergeable without loss, written in HDR's own form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

HIGHEST_US = 3_600_000_000
"""One hour. Longer durations are recorded as one hour: leaving them out would make the worst case look better."""


class Distribution:
    """Counts of durations from 0 to HIGHEST_US microseconds, exact to `digits` significant decimal digits."""

    __slots__ = ("_histogram",)

    def __init__(self, digits: int = 3) -> None:
        self._histogram = HdrHistogram(1, HIGHEST_US, digits)

    def record(self, values_us: NDArray[np.floating[Any] | np.integer[Any]]) -> None:
        """Any number of durations in microseconds; negative ones, which clocks can produce, count as zero."""
        whole = np.clip(np.rint(values_us), 0, HIGHEST_US).astype(np.int64)
        values, counts = np.unique(whole, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            self._histogram.record_value(value, count)

    def merge(self, other: Distribution) -> None:
        """Adds the counts of `other`, which must have as many digits."""
        self._histogram.add(other._histogram)

    @property
    def count(self) -> int:
        return int(self._histogram.get_total_count())

    @property
    def mean_us(self) -> float:
        indices = np.flatnonzero(self._counts)
        if not indices.size:
            return 0.0
        lowest = [self._histogram.get_value_from_index(index) for index in indices.tolist()]
        highest = [self._histogram.get_highest_equivalent_value(value) for value in lowest]
        return float(np.average((np.array(lowest) + highest) / 2, weights=self._counts[indices]))

    @property
    def max_us(self) -> float:
        return float(self._histogram.get_max_value())

    def percentiles_us(self, levels: Sequence[float]) -> list[float]:
        """One duration per level in percent: the shortest one that this share of the durations does not exceed. Zeros
        for an empty histogram."""
        if not self.count:
            return [0.0] * len(levels)
        ranks = np.maximum(1, np.ceil(np.asarray(levels) / 100 * self.count))
        indices = np.searchsorted(np.cumsum(self._counts), ranks)
        values = (self._histogram.get_value_from_index(i) for i in indices.tolist())
        return [min(float(self._histogram.get_highest_equivalent_value(v)), self.max_us) for v in values]

    def at_most(self, limit_us: float) -> int:
        """How many durations are at most `limit_us`, within the histogram's resolution."""
        if limit_us >= HIGHEST_US:
            return self.count
        return int(self._counts[: self._histogram.get_counts_array_index(int(limit_us)) + 1].sum())

    @property
    def _counts(self) -> NDArray[np.uint64]:
        """Of every bucket, for numpy: the library's own loops are in Python and take a thousand times as long."""
        return np.frombuffer(self._histogram.counts, np.uint64)

    def encode(self) -> str:
        """The compressed HDR form (V2, base64), which other HDR tools read too."""
        return str(self._histogram.encode().decode("ascii"))

    @classmethod
    def decode(cls, text: str) -> Distribution:
        """Raises ValueError when `text` is not an HDR histogram of this range."""
        try:
            read = HdrHistogram.decode(text.encode("ascii"))
            distribution = cls(read.significant_figures)
            distribution._histogram.add(read)
        except Exception as error:  # the library raises a dozen unrelated ones, zlib's and binascii's among them
            raise ValueError(f"not an HDR histogram of this program: {error}") from None
        return distribution
