"""Compares a model's measured figures with the catalogue's expected ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from models.entry import Entry
from rafaga.bundle import Metric

LOWER_IS_BETTER = frozenset({"mase"})


@dataclass(frozen=True)
class Shortfall:
    metric: Metric
    expected: float

    def __str__(self) -> str:
        found, bound = self.metric, "below" if self.metric.name in LOWER_IS_BETTER else "at least"
        return (
            f"{found.name} {found.value:.4f}{self._chance()} on {found.samples} samples of {found.dataset}; "
            f"expected {bound} {self.expected:.4f}"
        )

    def _chance(self) -> str:
        """The standard error of a share, because few samples may look like a bad model."""
        share = self.metric.value
        if self.metric.name in LOWER_IS_BETTER or not 0 <= share <= 1:
            return ""
        return f" ± {(share * (1 - share) / self.metric.samples) ** 0.5:.4f}"


def shortfalls(entry: Entry, metrics: Iterable[Metric]) -> Iterator[Shortfall]:
    """Figures of `metrics` that are worse than `entry.expected`; unmeasured ones are ignored."""
    for metric in metrics:
        expected = entry.expected.get(metric.name)
        if expected is None:
            continue
        reached = metric.value < expected if metric.name in LOWER_IS_BETTER else metric.value >= expected
        if not reached:
            yield Shortfall(metric, expected)
