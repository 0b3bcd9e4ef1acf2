"""Batch sizes from the server's /metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

METRIC = "rafaga_batch_size"


@dataclass(frozen=True)
class BatchSizes:
    """bounds: upper edges of the buckets, the last one infinite; counts: batches in each, not cumulative."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    rows: int

    @property
    def batches(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Rows per batch; 0 where there was none."""
        return self.rows / self.batches if self.batches else 0.0

    def labelled(self) -> list[tuple[str, int]]:
        """("5-8", 120) per bucket, without empty buckets at either end."""
        edges = [0, *(int(b) for b in self.bounds if b < math.inf)]
        names = [str(high) if high == low + 1 else f"{low + 1}-{high}" for low, high in pairwise(edges)]
        rows = list(zip([*names, f"{edges[-1] + 1}-"], self.counts, strict=True))
        used = [i for i, (_, count) in enumerate(rows) if count]
        return rows[used[0] : used[-1] + 1] if used else []


def scrape(url: str) -> str:
    """Raises OSError."""
    with urlopen(url, timeout=10) as reply:
        text: str = reply.read().decode()
    return text


def read(exposition: str, model: str) -> BatchSizes:
    """Raises KeyError when the text has no batch sizes of that model."""
    cumulative: dict[float, float] = {}
    rows = 0.0
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.labels.get("model") != model:
                continue
            if sample.name == f"{METRIC}_bucket":
                cumulative[float(sample.labels["le"])] = sample.value
            elif sample.name == f"{METRIC}_sum":
                rows = sample.value
    if not cumulative:
        raise KeyError(f"no {METRIC} of model {model}")
    bounds = sorted(cumulative)
    counts = [int(cumulative[b] - (cumulative[bounds[i - 1]] if i else 0)) for i, b in enumerate(bounds)]
    return BatchSizes(tuple(bounds), tuple(counts), int(rows))
