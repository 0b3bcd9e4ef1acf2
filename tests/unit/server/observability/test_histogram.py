"""It reads as the histogram of prometheus_client does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from rafaga.server.observability.metrics import BulkHistogram

ABOUT, BUCKETS = ("waited_seconds", "Waiting.", ("model",)), (0.001, 0.01, 1.0)
SERIES = {f"waited_seconds_{part}" for part in ("bucket", "sum", "count")}


def registered() -> tuple[BulkHistogram, CollectorRegistry]:
    registry = CollectorRegistry()
    return BulkHistogram(*ABOUT, registry=registry, buckets=BUCKETS), registry


def samples(registry: CollectorRegistry) -> dict[tuple[str, str, str], float]:
    return {
        (sample.name, sample.labels["model"], sample.labels.get("le", "")): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name in SERIES
    }


@given(st.lists(st.sampled_from([0.0, 0.0005, 0.001, 0.0011, 0.01, 0.5, 1.0, 1.1, 60.0]), max_size=50))
def test_it_reads_like_the_histogram_of_prometheus_client(values: list[float]) -> None:
    theirs = CollectorRegistry()
    child = Histogram(*ABOUT, buckets=BUCKETS, registry=theirs).labels("a")
    histogram, ours = registered()
    for value in values:
        child.observe(value)
    histogram.labels("a").observe_all(values[:7])
    histogram.labels("a").observe_all(values[7:])
    expected = samples(theirs)
    assert samples(ours) == pytest.approx(expected)
    assert samples(ours) == pytest.approx(expected)  # reading changes nothing


def test_a_scrape_can_select_it_by_name() -> None:
    histogram, registry = registered()
    histogram.labels("a").observe_all([0.5])
    named = registry.restricted_registry(["waited_seconds_sum"]).collect()
    assert [(sample.name, sample.value) for metric in named for sample in metric.samples] == [
        ("waited_seconds_sum", 0.5)
    ]
