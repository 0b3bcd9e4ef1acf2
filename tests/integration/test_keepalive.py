"""Peers that fall silent without a goodbye (a cable pulled, a node gone): pings find them, on both sides."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

import psutil
import pytest

from rafaga import Client, Keepalive, ModelNotFound, RetryPolicy, ServerUnreachable
from rafaga.server import app
from rafaga.server.transport.grpc import Limits
from tests.integration import http2, messages
from tests.integration.serving import PATIENCE_S, Serve, Served, Stubs, connected, eventually
from tests.integration.valve import Valve

IMAGE = messages.random_digits(0)
ONCE = RetryPolicy(max_attempts=1)


class Cable(NamedTuple):
    address: str
    pulled: threading.Event


@contextmanager
def cable_to(served: Served) -> Iterator[Cable]:
    """Carries the bytes of one connection until it is pulled: then nothing arrives any more, and neither side
    notices."""
    pulled, done = threading.Event(), threading.Event()

    def carry(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while (content := source.recv(1 << 16)) and not pulled.is_set():
                sink.sendall(content)
        if pulled.is_set():
            done.wait(PATIENCE_S)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def connect() -> None:
        client, server = listener.accept()[0], socket.create_connection(("127.0.0.1", served.port))
        with client, server:
            back = threading.Thread(target=carry, args=(server, client))
            back.start()
            carry(client, server)
            back.join()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=connect)
        thread.start()
        try:
            yield Cable(f"127.0.0.1:{listener.getsockname()[1]}", pulled)
        finally:
            done.set()
            thread.join()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers ping every half second, and allow pings as often as every 100 ms."""
    quick = partial(Limits, keepalive_ms=500, keepalive_timeout_ms=500, min_ping_interval_ms=100)
    monkeypatch.setattr(app, "Limits", quick)


def test_a_client_notices_that_its_server_is_gone(serve: Serve, valve: Valve) -> None:
    """Long before its deadline; the call may have been computed, so it is not sent again."""
    keepalive = Keepalive(interval_s=1.0, timeout_s=0.5)
    with (
        ThreadPoolExecutor() as pool,
        valve.closed(),
        cable_to(serve()) as cable,
        Client(cable.address, keepalive=keepalive, retry=ONCE) as client,
    ):
        asking = pool.submit(client.classify, IMAGE[0], model="digits", timeout_s=10 * PATIENCE_S)
        valve.wait_for_engine()
        cable.pulled.set()
        with pytest.raises(ServerUnreachable):
            asking.result(PATIENCE_S)


def test_a_server_notices_that_its_client_is_gone(impatient: None, serve: Serve, valve: Valve) -> None:
    """Its calls are freed, those of others go on."""
    served = serve()
    with valve.closed(), cable_to(served) as cable, connected(cable.address) as channel:
        other = served.vision.Classify.future(messages.classify(IMAGE))
        valve.wait_for_engine()
        gone = [Stubs(channel).vision.Classify.future(messages.classify(IMAGE)) for _ in range(3)]
        eventually(lambda: served.in_flight == 4, "all are there")
        cable.pulled.set()
        eventually(lambda: served.in_flight == 1, "those of the silent client are freed")
        assert not any(call.done() for call in gone)
    assert other.result(PATIENCE_S)


def test_a_client_that_pings_while_idle_is_let(impatient: None, serve: Serve) -> None:
    """Behind a balancer that drops idle connections: the connection, here the only one possible, is the same after
    many pings."""
    keepalive = Keepalive(interval_s=0.3, timeout_s=30.0, while_idle=True)
    with cable_to(serve()) as cable, Client(cable.address, keepalive=keepalive, retry=ONCE) as client:
        client.classify(IMAGE[0], model="digits", timeout_s=PATIENCE_S)
        time.sleep(1.0)
        client.classify(IMAGE[0], model="digits", timeout_s=PATIENCE_S)


def test_the_sdk_pings_no_more_often_than_servers_allow() -> None:
    assert Keepalive().interval_s * 1e3 > Limits(1).min_ping_interval_ms


def test_a_client_that_floods_with_pings_is_sent_away(server: Served) -> None:
    with http2.raw_connection(server.port) as connection:
        frames = [frame for _ in range(12) for frame in connection.until_pong()]
    assert any(b"too_many_pings" in frame.payload for frame in frames if frame.kind == http2.GOAWAY)
    assert server.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S).results


def test_an_old_connection_is_closed_and_its_calls_are_answered(serve: Serve, valve: Valve) -> None:
    """1. A call is computed longer than a connection may live. 2. The server asks the client to connect anew. 3. The
    call is answered, then the connection ends."""
    served = serve(max_connection_age_s=0.2)
    with http2.raw_connection(served.port) as connection:
        with valve.closed():
            connection.send(http2.call(1, "/rafaga.v1.Vision/Classify", messages.classify(IMAGE)))
            assert any(frame.kind == http2.GOAWAY for frame in connection.frames())
        rest = list(connection.frames())
    assert [frame.kind for frame in rest if frame.stream == 1] == [http2.HEADERS, http2.DATA, http2.HEADERS]


def test_an_idle_connection_is_closed(serve: Serve) -> None:
    with http2.raw_connection(serve(max_connection_idle_s=0.2).port) as connection:
        assert any(frame.kind == http2.GOAWAY for frame in connection.frames())


def test_the_sdk_loses_no_call_to_the_age_of_connections(serve: Serve) -> None:
    served, ports = serve(max_connection_age_s=0.1), set()
    with Client(served.address) as client:
        while len(ports) < 5:
            client.classify(IMAGE[0], model="digits", timeout_s=PATIENCE_S)
            open_now = psutil.Process().net_connections("tcp")
            ports |= {each.laddr.port for each in open_now if each.raddr and each.raddr.port == served.port}


def test_a_call_that_the_server_never_saw_is_sent_again() -> None:
    """It met a connection that was just being closed for its age. That does not count as a try."""
    went_away = http2.frame(http2.GOAWAY, 0, 0, bytes(8))  # the last stream that was seen: none
    fields = ((":status", "200"), ("grpc-status", "5"), ("content-type", "application/grpc"))
    not_found = http2.response_headers(1, *fields)
    with (
        http2.scripted_server(went_away, not_found) as port,
        Client(f"127.0.0.1:{port}", retry=ONCE) as client,
        pytest.raises(ModelNotFound),
    ):
        client.model("digits", timeout_s=PATIENCE_S)
