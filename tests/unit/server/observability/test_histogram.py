"""Values are sorted into buckets when the histogram is read."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from rafaga.server.observability.metrics import BufferedHistogram

ABOUT, BUCKETS = ("waited_seconds", "Waiting.", ("model",)), (0.001, 0.01, 1.0)
SERIES = {f"waited_seconds_{part}" for part in ("bucket", "sum", "count")}


def registered() -> tuple[BufferedHistogram, CollectorRegistry]:
    registry = CollectorRegistry()
    return BufferedHistogram(*ABOUT, registry=registry, buckets=BUCKETS), registry


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
    histogram.labels("a").observe(*values[:7])
    for value in values[7:]:
        histogram.labels("a").observe(value)
    expected = samples(theirs)
    assert samples(ours) == pytest.approx(expected)
    assert samples(ours) == pytest.approx(expected)  # reading changes nothing


def test_nothing_is_lost_between_threads() -> None:
    histogram, registry = registered()
    child = histogram.labels("a")

    def observe() -> None:
        for _ in range(20_000):
            child.observe(0.5)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        child.read()
    assert samples(registry)["waited_seconds_count", "a", ""] == 80_000
    assert samples(registry)["waited_seconds_sum", "a", ""] == 40_000


def test_a_scrape_can_select_it_by_name() -> None:
    histogram, registry = registered()
    histogram.labels("a").observe(0.5)
    named = registry.restricted_registry(["waited_seconds_sum"]).collect()
    assert [(sample.name, sample.value) for metric in named for sample in metric.samples] == [
        ("waited_seconds_sum", 0.5)
    ]
