from __future__ import annotations

import pytest

from rafaga.addresses import joined, metrics_url


@pytest.mark.parametrize(
    ("host", "text"), [("localhost", "localhost:1"), ("10.0.0.1", "10.0.0.1:1"), ("::1", "[::1]:1"), ("::", "[::]:1")]
)
def test_joined(host: str, text: str) -> None:
    assert joined(host, 1) == text


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("localhost", "http://localhost:8080/metrics"),
        ("gpu1:9000", "http://gpu1:9000/metrics"),
        ("[::1]", "http://[::1]:8080/metrics"),
        ("http://gpu1:9000/", "http://gpu1:9000/metrics"),
        ("https://models.example/rafaga/metrics", "https://models.example/rafaga/metrics"),
    ],
)
def test_metrics_url(address: str, url: str) -> None:
    assert metrics_url(address) == url


def test_not_an_address() -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        metrics_url("local host:x")
