"""A caller that goes away, at any stage: its work is dropped where it can be, its state is freed, others go on."""

from __future__ import annotations

import gc

import grpc
import pytest

from rafaga.server.transport.router import Call
from tests.integration import http2, messages
from tests.integration.serving import PATIENCE_S, Serve, Served, assert_serves, connected, eventually, wait_for_queue
from tests.integration.valve import Valve

CLASSIFY = "/rafaga.v1.Vision/Classify"
IMAGE = messages.random_digits(0)


@pytest.fixture
def served(serve: Serve, valve: Valve) -> Served:
    return serve()


def test_before_the_request_is_whole(served: Served, valve: Valve) -> None:
    """Headers, half a message, reset."""
    with http2.raw_connection(served.port) as connection:
        half = http2.grpc_message(messages.classify(IMAGE))[:300]
        connection.send(http2.headers(1, CLASSIFY) + http2.data(1, half, end_stream=False))
        connection.until_pong()
        connection.send(http2.reset(1))
        connection.send(http2.call(3, CLASSIFY, messages.classify(IMAGE)))
        assert connection.until_stream_ends(3)[-1].kind == http2.HEADERS
    assert_serves(served)


def test_between_the_parts_of_a_split_request(served: Served, valve: Valve) -> None:
    """The parts that are not in a batch yet are never run."""
    with valve.closed():
        call = served.vision.Classify.future(messages.classify(messages.random_digits(1, 100)))
        valve.wait_for_engine()
        call.cancel()
        eventually(lambda: served.in_flight == 0, "the call ended")
        wait_for_queue(served, "digits", 0)
    assert_serves(served)
    assert valve.runs[0] <= 32
    assert set(valve.runs[1:]) == {1}, "those of `assert_serves`"


def test_by_closing_the_connection(served: Served, valve: Valve) -> None:
    """Forty callers vanish with their connection, queued and computing; a neighbour's calls go on."""
    with valve.closed():
        with connected(served.address) as channel:
            gone = [
                channel.unary_unary(CLASSIFY).future(messages.classify(IMAGE).SerializeToString()) for _ in range(40)
            ]
            valve.wait_for_engine()
            eventually(lambda: served.in_flight == 40, "all are there")
            neighbour = served.vision.Classify.future(messages.classify(IMAGE))
            eventually(lambda: served.in_flight == 41, "the neighbour too")
        eventually(lambda: served.in_flight == 1, "they are gone")
    assert all(future.code() is grpc.StatusCode.CANCELLED for future in gone)
    assert neighbour.result(PATIENCE_S)
    assert_serves(served)


def test_a_call_is_freed_when_it_ends_and_not_by_the_garbage_collector(served: Served) -> None:
    """Answered, refused or cancelled: its request may be large, and the collector comes round when it likes."""
    gc.collect()
    # Engines of servers that other tests share hold on to their last batch.
    others = _calls()
    gc.disable()
    try:
        for _ in range(20):
            served.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S)
            with pytest.raises(grpc.RpcError):
                served.vision.Classify(messages.classify(IMAGE, model="unknown"), timeout=PATIENCE_S)
            served.vision.Classify.future(messages.classify(IMAGE)).cancel()
        # The threads that serve hold on to the last they saw.
        eventually(lambda: len(_calls()) <= len(others) + 3, "calls are freed")
    finally:
        gc.enable()


def _calls() -> list[object]:
    # By their type: isinstance asks objects for their class, and some of PyTorch's answer with a warning.
    return [o for o in gc.get_objects() if issubclass(type(o), Call)]
