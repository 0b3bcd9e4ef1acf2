"""The HTTP side over a real socket: what each path says, and when."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from rafaga.server.transport.http import HttpServer


class Site:
    def __init__(self) -> None:
        self.unready, self.alive = "loading", True
        self.registry = CollectorRegistry()
        Counter("seen", "Seen.", registry=self.registry).inc(3)
        self.server = HttpServer("127.0.0.1", 0, self.registry, lambda: self.unready, lambda: self.alive)
        self.server.start()

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.server.port}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.server.close()


def test_alive_before_it_is_ready(site: Site) -> None:
    assert site.get("/healthz") == (200, "alive\n")
    assert site.get("/readyz") == (503, "not ready: loading\n")


def test_ready_as_long_as_it_is(site: Site) -> None:
    site.unready = ""
    assert site.get("/readyz") == (200, "ready\n")
    site.unready = "stopping"
    assert site.get("/readyz")[0] == 503


def test_alive_no_longer_than_it_is(site: Site) -> None:
    site.alive = False
    assert site.get("/healthz") == (503, "a restart is required\n")


def test_metrics(site: Site) -> None:
    status, text = site.get("/metrics")
    assert status == 200
    assert "seen_total 3.0" in text


@pytest.mark.parametrize("path", ["/", "/metrics/", "/../etc/passwd", "/healthz/../metrics", "/%2e%2e/secret"])
def test_other_paths(site: Site, path: str) -> None:
    assert site.get(path)[0] == 404


def test_a_query_is_no_other_path(site: Site) -> None:
    assert site.get("/healthz?verbose=1")[0] == 200


def test_a_visitor_who_says_nothing_holds_up_nobody(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.server.port)):
        assert site.get("/healthz")[0] == 200


def test_rubbish_is_answered_and_survived(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.server.port), timeout=30) as connection:
        connection.sendall(b"\x00\xff rubbish\r\n\r\n")
        assert b"400" in connection.recv(1000)
    assert site.get("/healthz")[0] == 200


def test_a_taken_port_is_named(site: Site) -> None:
    with pytest.raises(OSError, match=str(site.server.port)):
        HttpServer("127.0.0.1", site.server.port, site.registry, lambda: "").start()


def test_without_a_start() -> None:
    server = HttpServer("127.0.0.1", 0, CollectorRegistry(), lambda: "")
    assert server.port == 0
    server.close()


def test_closed_means_closed() -> None:
    site = Site()
    site.server.close()
    with pytest.raises(urllib.error.URLError):
        site.get("/healthz")
