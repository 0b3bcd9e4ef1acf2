from __future__ import annotations

import pytest

from rafaga.addresses import joined, metrics_url


def test_joined() -> None:
    joined_to_1 = [joined(host, 1) for host in ("localhost", "10.0.0.1", "::1", "::")]
    assert joined_to_1 == ["localhost:1", "10.0.0.1:1", "[::1]:1", "[::]:1"]


def test_metrics_url() -> None:
    assert metrics_url("localhost") == "http://localhost:8080/metrics"
    assert metrics_url("[::1]") == "http://[::1]:8080/metrics"
    assert metrics_url("gpu1:9000") == metrics_url("http://gpu1:9000/") == "http://gpu1:9000/metrics"
    assert metrics_url("https://models.example/rafaga/metrics") == "https://models.example/rafaga/metrics"


def test_not_an_address() -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        metrics_url("local host:x")
