"""The HTTP port over a real socket: its paths, and what it bears from clients that misbehave."""

from __future__ import annotations

import asyncio
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from rafaga.server.transport import http
from rafaga.server.transport.http import HttpServer

WAIT_S = 30.0
SOON_S = 0.2
ECHO, SLOW = b"GET /echo HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"
HALF = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf"


class Site:
    """Echoes bodies at /echo; /slow answers when `answer` is set; /bug fails."""

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.asked = threading.Event()
        routes = [
            Route("/echo", self._echo, methods=["GET", "POST"]),
            Route("/slow", self._slow),
            Route("/bug", self._bug),
        ]
        self.server = HttpServer("127.0.0.1", 0, routes)
        self.server.start()

    async def _echo(self, request: Request) -> Response:
        return Response(await request.body())

    async def _slow(self, _: Request) -> Response:
        self.asked.set()
        await asyncio.to_thread(self.answer.wait, WAIT_S)
        return PlainTextResponse("at last")

    async def _bug(self, _: Request) -> Response:
        raise ValueError("secret")

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.server.port}{path}", timeout=WAIT_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.server.port), timeout=WAIT_S)
        connection.sendall(sent)
        return connection

    @contextmanager
    def busy(self) -> Iterator[socket.socket]:
        """A connection whose request is in work."""
        with self.connect(SLOW) as connection:
            assert self.asked.wait(WAIT_S)
            yield connection


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.answer.set()
    site.server.close()


def read(connection: socket.socket, until: bytes) -> bytes:
    found = b""
    while until not in found:
        part = connection.recv(1000)
        assert part, found
        found += part
    return found


def ended(connection: socket.socket) -> bool:
    """Waits until the server has closed it."""
    try:
        while connection.recv(1000):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    "path", ["/", "/echo/", "/../etc/passwd", "/echo/../slow", "/%2e%2e/secret", "//echo", "/echo%2F"]
)
def test_other_paths(site: Site, path: str) -> None:
    assert site.get(path) == (404, '{"error":"Not Found: see /openapi.json"}')
    assert site.get("/echo?path=" + path)[0] == 200


def test_a_bug_shows_no_detail(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    status, text = site.get("/bug")
    assert (status, "secret" in text) == (500, False)
    assert "secret" in caplog.text


def test_malformed_requests_are_answered_and_survived(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with site.connect(b"\x00\xff rubbish\r\n\r\n") as connection:
        assert b"400" in connection.recv(1000)
    with site.connect(b"GET /echo HTTP/1.1\r\n" + b"A: b\r\n" * 10_000) as connection:
        assert b" 431 " in (answer := connection.recv(1000)) or b" 400 " in answer
    assert site.get("/echo")[0] == 200
    assert not caplog.records, "such requests must not fill the log"


def test_pipelined_requests_are_answered_in_order(site: Site) -> None:
    one, two = (b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n" + body for body in (b"one", b"two"))
    with site.connect(one + two + b"GET /echo HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n") as connection:
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.index(b"one") < answer.index(b"two")


def test_a_body_does_not_wait_for_the_head_to_be_acknowledged(site: Site) -> None:
    with site.busy() as connection:
        (served,) = site.server._state.connections
        accepted = served.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        site.answer.set()
        read(connection, b"at last")


@pytest.mark.parametrize(
    "sent",
    [b"", ECHO[:-2], HALF, ECHO, ECHO + ECHO[:7]],
    ids=["silent", "half a head", "half a body", "idle", "half a second head"],
)
def test_patience_with_a_client_ends(site: Site, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """Unless it waits for its answer."""
    monkeypatch.setattr(http, "PATIENCE_S", SOON_S)
    with site.busy() as asking:
        with site.connect(sent) as connection:
            assert ended(connection)
        site.answer.set()
        read(asking, b"at last")


def test_connections_are_bounded_and_the_longest_waiting_one_makes_room(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site.server, "_max_connections", 3)
    with site.busy() as busy, site.connect() as first, site.connect() as second:
        for each in (first, second):  # they are connected in this order, and wait for requests
            each.sendall(ECHO)
            read(each, b"200")
        assert site.get("/echo")[0] == 200
        assert ended(first)
        second.sendall(ECHO)
        read(second, b"200")
        site.answer.set()
        read(busy, b"at last")


def test_no_connection_is_taken_while_all_are_busy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.server, "_max_connections", 1)
    with site.busy() as busy:
        with site.connect() as late:
            assert ended(late)
        site.answer.set()
        read(busy, b"at last")
        busy.sendall(ECHO)
        read(busy, b"200")


def test_a_taken_port_is_named(site: Site) -> None:
    with pytest.raises(OSError, match=str(site.server.port)):
        HttpServer("127.0.0.1", site.server.port, []).start()


def test_without_a_start() -> None:
    server = HttpServer("127.0.0.1", 0, [])
    assert server.port == 0
    server.close()


def test_closing_waits_for_answers_and_for_no_client(site: Site) -> None:
    """1. One client waits for its answer, one is idle, one has sent half a body. 2. The server closes: the first gets
    its answer, the others are cut off at once. 3. The port is closed."""
    with site.connect() as idle, site.connect(HALF) as slow, site.busy() as asking:
        closing = threading.Thread(target=site.server.close, args=(WAIT_S,))
        closing.start()
        assert ended(idle)
        assert ended(slow)
        site.answer.set()
        assert b"at last" in b"".join(iter(lambda: asking.recv(1000), b""))
        closing.join(WAIT_S)
        assert not closing.is_alive()
    with pytest.raises(urllib.error.URLError):
        site.get("/echo")
