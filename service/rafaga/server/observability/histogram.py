"""A histogram for values observed once per request: observing appends to a buffer, and reading sorts it into buckets.

prometheus_client takes two locks and searches the buckets for each value, about 3 µs: a tenth of a small model's
request. Appending takes 0.05 µs, and sorting thousands of values at once takes another 0.05 µs for each.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

# Buffered values before an observing thread sorts them, if no scrape does it earlier.
_MAX_BUFFERED = 4096


class Observations:
    """Values of one label set. `observe` from any thread."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = np.array(bounds)
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0
        self._buffer: deque[float] = deque()  # its methods are atomic
        self._sorting = threading.Lock()

    def observe(self, *values: float) -> None:
        self._buffer.extend(values)
        if len(self._buffer) >= _MAX_BUFFERED:
            self.read()

    def read(self) -> tuple[list[int], float]:
        """The number of values in each bucket (the last one has no upper bound), and the sum of all values."""
        with self._sorting:
            buffer = self._buffer
            values = np.array([buffer.popleft() for _ in range(len(buffer))])
            # A value that equals a bucket's upper bound belongs to it.
            self._counts += np.bincount(self._bounds.searchsorted(values), minlength=len(self._counts))
            self._sum += float(values.sum())
            return self._counts.tolist(), self._sum


class BufferedHistogram(Collector):
    """Takes the arguments that prometheus_client's Histogram takes."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], *, registry: CollectorRegistry, buckets: Sequence[float]
    ) -> None:
        self._describe = partial(HistogramMetricFamily, name, text, labels=labels)
        self._bounds = buckets
        self._children: dict[tuple[str, ...], Observations] = {}
        self._adding = threading.Lock()
        registry.register(self)

    def labels(self, *values: str) -> Observations:
        with self._adding:
            return self._children.setdefault(values, Observations(self._bounds))

    def remove(self, *values: str) -> None:
        with self._adding:
            del self._children[values]

    def describe(self) -> Iterable[HistogramMetricFamily]:
        yield self._describe()

    def collect(self) -> Iterable[HistogramMetricFamily]:
        with self._adding:
            children = list(self._children.items())
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        metric = self._describe()
        for labels, observations in children:
            counts, total = observations.read()
            metric.add_metric(labels, list(zip(names, np.cumsum(counts).tolist(), strict=True)), total)
        yield metric
