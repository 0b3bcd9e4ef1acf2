"""Values appear at the next scrape, once, under the names that `families` lists."""

from __future__ import annotations

import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from rafaga.server.observability import families
from rafaga.server.observability.metrics import BatchRecord, BulkHistogram, Metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_batches() -> None:
    """Two requests complete in a batch of five rows; one of them took 0.2 s in an earlier batch."""
    metrics = Metrics()
    model = metrics.model("digits")
    model.batches.append(BatchRecord(5, 0.1, [0.01, 0.03], earlier_s=0.2, ended=1e9))
    assert value(metrics, "rafaga_batch_size_sum", model="digits") == 5
    assert value(metrics, "rafaga_batch_size_bucket", model="digits", le="4.0") == 0
    assert value(metrics, "rafaga_batch_size_bucket", model="digits", le="8.0") == 1
    assert value(metrics, "rafaga_inference_seconds_sum", model="digits") == pytest.approx(0.1)
    assert value(metrics, "rafaga_queue_seconds_count", model="digits") == 2
    assert value(metrics, "rafaga_queue_seconds_sum", model="digits") == pytest.approx(0.04)
    totals = model.statistics
    assert (totals.requests, totals.rows) == (2, 5)
    assert totals.inference_s == pytest.approx(2 * 0.1 + 0.2)
    assert totals.executions == {5: (1, 0.1)}
    assert totals.last_unix_s == 1e9


def test_engines_count_concurrently() -> None:
    model = Metrics().model("digits")

    def count() -> None:
        for _ in range(5_000):
            model.batches.append(BatchRecord(2, 0.5, [0.25, 0.25]))
            model.fold()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    totals = model.statistics
    assert (totals.requests, totals.rows, totals.queue_s) == (40_000, 40_000, 10_000.0)
    assert totals.executions == {2: (20_000, 10_000.0)}


def test_requests_without_an_answer() -> None:
    metrics = Metrics()
    model = metrics.model("digits")
    model.job_failed(families.FAILURES)
    model.dropped("deadline", 3)
    model.dropped("cancelled", 2)
    assert value(metrics, "rafaga_engine_failures_total", model="digits") == 1
    assert value(metrics, "rafaga_dropped_total", model="digits", cause="deadline") == 3
    assert value(metrics, "rafaga_dropped_total", model="digits", cause="cancelled") == 2
    assert model.statistics.failed == 4, "a cancelled request did not fail"


def test_versions_in_service_together_are_joined() -> None:
    """Their queues add up, the worst prediction counts, and a version that ends is forgotten."""
    metrics = Metrics()
    old, new = metrics.model("digits"), metrics.model("digits")
    for version, (rows, wait, capacity) in ((old, (3, 0.5, 10.0)), (new, (4, 0.2, 30.0))):
        version.watch_queue(
            lambda rows=rows: rows, lambda: 1, lambda wait=wait: wait, lambda capacity=capacity: capacity
        )
    names = ("rafaga_queue_rows", "rafaga_queue_predicted_wait_seconds", "rafaga_model_capacity_rows_per_second")
    assert [value(metrics, name, model="digits") for name in names] == [7, 0.5, 10.0]
    old.watch_no_more()
    assert [value(metrics, name, model="digits") for name in names] == [4, 0.2, 30.0]
    new.watch_no_more()
    assert [value(metrics, name, model="digits") for name in names] == [None, None, None]


def test_the_life_of_a_version() -> None:
    metrics = Metrics()
    about = {"model": "digits", "version": "3"}
    metrics.model_refused("digits", 3, still_served=False)
    assert value(metrics, "rafaga_model_ready", **about) == 0
    assert value(metrics, "rafaga_model_load_failures_total", **about) == 1
    metrics.model_loaded("digits", 3, 1.5, metrics.model("digits"))
    assert value(metrics, "rafaga_model_ready", **about) == 1
    assert value(metrics, "rafaga_model_load_seconds", **about) == 1.5
    metrics.model_refused("digits", 3, still_served=True)
    assert value(metrics, "rafaga_model_ready", **about) == 1
    metrics.model_ready("digits", 3, False)
    assert value(metrics, "rafaga_model_ready", **about) == 0
    metrics.model_gone("digits", 3)
    assert value(metrics, "rafaga_model_ready", **about) is None


def test_every_family_is_exposed_as_listed() -> None:
    metrics = Metrics()
    model = metrics.model("digits")
    model.watch_queue(lambda: 0, lambda: 0, lambda: 0.0, lambda: 1.0)
    exposed = {f.name: f for f in text_string_to_metric_families(generate_latest(metrics.registry).decode())}
    for family in families.FAMILIES:
        assert exposed[family.name].type == family.kind.value
        assert exposed[family.name].documentation == family.text
    ours = {name for name in exposed if name.startswith("rafaga_") and not name.endswith("_created")}
    assert ours == {family.name for family in families.FAMILIES}, "every metric is listed"


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
