"""What is read off two scrapes."""

from __future__ import annotations

import pytest

from rafaga.cli._top import ServerLoad, lines, load_between

BEFORE = {
    ("rafaga_requests_total", (("code", "OK"), ("method", "m"))): 100.0,
    ("rafaga_queue_seconds_count", (("model", "a"),)): 100.0,
}
AFTER = {
    ("rafaga_requests_total", (("code", "OK"), ("method", "m"))): 120.0,
    ("rafaga_requests_total", (("code", "RESOURCE_EXHAUSTED"), ("method", "m"))): 6.0,
    ("rafaga_requests_total", (("code", "INTERNAL"), ("method", "m"))): 2.0,
    ("rafaga_refusals_total", (("method", "m"), ("reason", "QUEUE_FULL"))): 6.0,
    ("rafaga_refusals_total", (("method", "m"), ("reason", "ENGINE_FAILURE"))): 2.0,
    ("rafaga_request_seconds_bucket", (("le", "0.001"), ("method", "m"))): 10.0,
    ("rafaga_request_seconds_bucket", (("le", "0.01"), ("method", "m"))): 20.0,
    ("rafaga_request_seconds_bucket", (("le", "+Inf"), ("method", "m"))): 20.0,
    ("rafaga_queue_seconds_count", (("model", "a"),)): 120.0,
    ("rafaga_queue_seconds_sum", (("model", "a"),)): 0.2,
    ("rafaga_inference_seconds_count", (("model", "a"),)): 5.0,
    ("rafaga_inference_seconds_sum", (("model", "a"),)): 0.01,
    ("rafaga_batch_size_count", (("model", "a"),)): 5.0,
    ("rafaga_batch_size_sum", (("model", "a"),)): 20.0,
    ("rafaga_queue_rows", (("model", "a"),)): 7.0,
    ("rafaga_engine_failures_total", (("model", "a"),)): 2.0,
    ("rafaga_dropped_total", (("cause", "cancelled"), ("model", "a"))): 9.0,
    ("rafaga_requests_in_flight", ()): 3.0,
    ("process_cpu_seconds_total", ()): 1.0,
    ("rafaga_model_ready", (("model", "a"), ("version", "10"))): 1.0,
    ("rafaga_model_ready", (("model", "a"), ("version", "9"))): 1.0,
    ("rafaga_model_ready", (("model", "b"), ("version", "1"))): 0.0,
}


def test_rates_and_means() -> None:
    load = load_between(BEFORE, AFTER, 2.0)
    assert (load.requests, load.refused, load.failed) == (14.0, 3.0, 1.0)
    assert (load.in_flight, load.cpu_cores) == (3, 0.5)
    assert load.p50_ms == pytest.approx(1.0)
    assert load.p99_ms == pytest.approx(9.82)
    a, b = load.models
    assert (a.versions, a.requests, a.batch_size, a.queued_rows, a.errors) == ((9, 10), 10.0, 4.0, 7, 1.0)
    assert (a.queue_ms, a.latency_ms) == (pytest.approx(10.0), pytest.approx(12.0))
    assert (b.versions, b.requests, b.latency_ms) == ((), 0.0, None)


def test_a_server_that_restarted_counts_from_zero() -> None:
    assert load_between(AFTER, BEFORE, 2.0).requests == 50.0


def test_lines() -> None:
    text = lines(load_between(BEFORE, AFTER, 2.0), "http://h:8080/metrics")
    assert text[1:3] == [
        "14.0 requests/s, p50 1.0 ms, p99 9.8 ms; refused 3.0/s, failed 1.0/s",
        "3 in flight, 0.50 cores busy",
    ]
    assert [line.split() for line in text[5:]] == [
        ["a", "9,10", "10.0", "12.00", "10.00", "4.0", "7", "1.0"],
        ["b", "down", "0.0", "-", "-", "-", "0", "0.0"],
    ]
    assert lines(ServerLoad(0, 0, 0, None, None, 0, 0, ()), "u")[-1] == "no models"
