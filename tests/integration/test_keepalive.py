"""Peers that fall silent without a goodbye (a cable pulled, a node gone): pings find them, on both sides."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psutil
import pytest

from rafaga import Client, Keepalive, RetryPolicy, ServerUnreachable
from rafaga.server import app
from rafaga.server.transport.grpc import Limits
from tests.integration import http2, messages
from tests.integration.serving import PATIENCE_S, Serve, Served, Stubs, connected, eventually
from tests.integration.valve import Valve

IMAGE = messages.random_digits(0)
GOAWAY_DEBUG = b"too_many_pings"


class Cable:
    """Carries bytes between a client and a server until it is pulled: then nothing arrives any more, and neither
    side notices."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._to = port
        self._pulled = threading.Event()
        self._done = threading.Event()
        self._sockets: list[socket.socket] = [self._listener]
        self._thread = threading.Thread(target=self._carry)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def pull(self) -> None:
        self._pulled.set()

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        for each in self._sockets:
            each.close()

    def _carry(self) -> None:
        other: dict[socket.socket, socket.socket] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._done.is_set():
                if self._pulled.is_set():
                    self._done.wait(0.05)
                    continue
                for key, _ in selector.select(0.05):
                    end = key.fileobj
                    assert isinstance(end, socket.socket)
                    if end is self._listener:
                        client, server = end.accept()[0], socket.create_connection(("127.0.0.1", self._to))
                        other |= {client: server, server: client}
                        self._sockets += [client, server]
                        for each in (client, server):
                            selector.register(each, selectors.EVENT_READ)
                        continue
                    content = end.recv(1 << 16)
                    if content:
                        other[end].sendall(content)
                    else:
                        selector.unregister(end)
                        other[end].shutdown(socket.SHUT_WR)


@contextmanager
def cable_to(served: Served) -> Iterator[Cable]:
    cable = Cable(served.port)
    try:
        yield cable
    finally:
        cable.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers ping every half second, and allow pings as often as every 100 ms."""
    quick = Limits(1, keepalive_ms=500, keepalive_timeout_ms=500, min_ping_interval_ms=100)
    times = ("keepalive_ms", "keepalive_timeout_ms", "min_ping_interval_ms")
    monkeypatch.setattr(app, "Limits", partial(Limits, **{name: getattr(quick, name) for name in times}))


def test_a_client_notices_that_its_server_is_gone(serve: Serve, valve: Valve) -> None:
    """Long before its deadline; the call may have been computed, so it is not sent again."""
    served = serve()
    keepalive = Keepalive(interval_s=1.0, timeout_s=0.5)
    with (
        valve.closed(),
        cable_to(served) as cable,
        Client(cable.address, keepalive=keepalive, retry=RetryPolicy(max_attempts=1)) as client,
    ):
        ends: list[Exception] = []

        def ask() -> None:
            with pytest.raises(ServerUnreachable) as end:
                client.classify(IMAGE[0], model="digits", timeout_s=10 * PATIENCE_S)
            ends.append(end.value)

        asking = threading.Thread(target=ask)
        asking.start()
        valve.wait_for_engine()
        cable.pull()
        asking.join(PATIENCE_S)
        assert len(ends) == 1


def test_a_server_notices_that_its_client_is_gone(impatient: None, serve: Serve, valve: Valve) -> None:
    """Its calls are freed, those of others go on."""
    served = serve()
    with valve.closed(), cable_to(served) as cable, connected(cable.address) as channel:
        other = served.vision.Classify.future(messages.classify(IMAGE))
        valve.wait_for_engine()
        gone = [Stubs(channel).vision.Classify.future(messages.classify(IMAGE)) for _ in range(3)]
        eventually(lambda: served.in_flight == 4, "all are there")
        cable.pull()
        eventually(lambda: served.in_flight == 1, "those of the silent client are freed")
        assert not any(call.done() for call in gone)
    assert other.result(PATIENCE_S)


def test_a_client_that_pings_while_idle_is_let(impatient: None, serve: Serve) -> None:
    """Behind a balancer that drops idle connections: the connection is the same after many pings."""
    served = serve()
    with cable_to(served) as cable:
        keepalive = Keepalive(interval_s=0.3, timeout_s=30.0, while_idle=True)
        with Client(cable.address, keepalive=keepalive, retry=RetryPolicy(max_attempts=1)) as client:
            client.classify(IMAGE[0], model="digits", timeout_s=PATIENCE_S)
            time.sleep(1.0)
            client.classify(IMAGE[0], model="digits", timeout_s=PATIENCE_S)
        assert len(cable._sockets) == 3, "one connection"


def test_the_sdk_pings_no_more_often_than_servers_allow() -> None:
    assert Keepalive().interval_s * 1e3 > Limits(1).min_ping_interval_ms


def test_a_client_that_floods_with_pings_is_sent_away(serve: Serve) -> None:
    served = serve()
    with http2.raw_connection(served.port) as connection:
        kinds = []
        for _ in range(12):
            kinds += [frame for frame in connection.until_pong() if frame.kind == http2.GOAWAY]
        told = [frame.payload for frame in kinds]
    assert any(GOAWAY_DEBUG in payload for payload in told)
    assert served.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S).results


def test_an_old_connection_is_closed_and_its_calls_are_answered(serve: Serve, valve: Valve) -> None:
    """1. A call is computed longer than a connection may live. 2. The server asks the client to connect anew. 3. The
    call is answered, then the connection ends."""
    served = serve(max_connection_age_s=0.2)
    with http2.raw_connection(served.port) as connection:
        with valve.closed():
            connection.send(http2.call(1, "/rafaga.v1.Vision/Classify", messages.classify(IMAGE)))
            frames = connection.frames()
            assert any(frame.kind == http2.GOAWAY for frame in frames)
        rest = list(connection.frames())
    assert [frame.kind for frame in rest if frame.stream == 1] == [http2.HEADERS, http2.DATA, http2.HEADERS]


def test_an_idle_connection_is_closed(serve: Serve) -> None:
    with http2.raw_connection(serve(max_connection_idle_s=0.2).port) as connection:
        assert any(frame.kind == http2.GOAWAY for frame in connection.frames())


def test_the_sdk_loses_no_call_to_the_age_of_connections(serve: Serve) -> None:
    served, ports = serve(max_connection_age_s=0.1), set()
    with Client(served.address, retry=RetryPolicy(max_attempts=1)) as client:
        while len(ports) < 5:
            client.classify(IMAGE[0], model="digits", timeout_s=PATIENCE_S)
            open_now = psutil.Process().net_connections("tcp")
            ports |= {each.laddr.port for each in open_now if each.raddr and each.raddr.port == served.port}
