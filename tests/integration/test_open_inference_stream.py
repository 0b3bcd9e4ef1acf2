"""ModelStreamInfer: each message on a stream is a call of its own."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Self

import grpc
import numpy as np
import pytest

from rafaga.errors import Draining, ModelNotFound, QueueFull, Unauthenticated
from rafaga.inference import open_inference_pb2 as pb
from rafaga.server.services.open_inference.stream import WINDOW
from rafaga.server.transport.grpc import MAX_STREAMS
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import (
    PATIENCE_S,
    Serve,
    Served,
    Stubs,
    assert_refused,
    assert_serves,
    eventually,
    refusal,
    wait_for_queue,
)
from tests.integration.valve import Valve

DIGIT = messages.random_digits(0)
GRPC_ERRORS = (("triton_grpc_error", "true"),)
UNHURRIED = {"max_queue_wait_ms": 600_000}


class Conversation:
    """A stream that a test writes to and reads from."""

    def __init__(self, stubs: Stubs, **options: Any) -> None:
        self._requests: queue.SimpleQueue[pb.ModelInferRequest | None] = queue.SimpleQueue()
        options = {"timeout": PATIENCE_S} | options
        self.call = oip.stub(stubs).ModelStreamInfer(iter(self._requests.get, None), **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.call.cancel()
        self.half_close()

    def send(self, request: pb.ModelInferRequest, identity: str = "") -> None:
        request.id = identity
        self._requests.put(request)

    def ask(self, number: int) -> None:
        self.send(oip.images(digits(number)))
        assert_answers(number, next(self))

    def half_close(self) -> None:
        self._requests.put(None)

    def __next__(self) -> pb.ModelStreamInferResponse:
        return next(self.call)

    def rest(self) -> list[pb.ModelStreamInferResponse]:
        """Closes the sending side and reads the remaining answers."""
        self.half_close()
        return list(self.call)


@pytest.fixture
def talk() -> Iterator[Talk]:
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(Conversation(*arguments, **options))


Talk = Callable[..., Conversation]


def digits(number: int) -> np.ndarray:
    return messages.random_digits(number, 1 + number % 3)


def assert_answers(number: int, response: pb.ModelStreamInferResponse) -> None:
    assert response.error_message == ""
    found = oip.arrays(response.infer_response)["probabilities"]
    np.testing.assert_allclose(found, bundles.classify(digits(number)), atol=1e-5)


def test_messages_are_answered_each_under_its_id(server: Served, talk: Talk) -> None:
    """1. While the stream stays open. 2. By another model. 3. Many at once."""
    stream = talk(server)
    for number in range(3):
        stream.ask(number)
    stream.send(oip.request("series", history=messages.random_history(0, 12)[np.newaxis]), "another model")
    other = next(stream).infer_response
    assert (other.id, other.model_name) == ("another model", "series")
    for number in range(600):
        stream.send(oip.images(digits(number)), str(number))
    answered = {int(response.infer_response.id): response for response in stream.rest()}
    assert answered.keys() == set(range(600))
    for number, response in answered.items():
        assert response.infer_response.parameters["triton_final_response"].bool_param
        assert_answers(number, response)


def test_an_error_is_a_message_with_the_id_of_its_request(server: Served, talk: Talk) -> None:
    bad = {
        "unknown": (oip.images(DIGIT, "unknown"), "no model 'unknown'"),
        "shape": (oip.images(DIGIT[:, 1:]), "got [1, 27, 28, 1]"),
        "image": (oip.files(b"what"), "JPEG, PNG, WebP, GIF or BMP"),
        "sequence": (oip.images(DIGIT, given={"sequence_id": 1}), "without sequence_id"),
        "engine": (oip.images(np.full((1, 1, 1, 1), 200, np.uint8), "fragile"), "fails on this input: Gather: "),
    }
    stream = talk(server)
    for identity, (request, _) in bad.items():
        stream.send(request, identity)
        stream.send(oip.images(digits(1)), f"after {identity}")
    responses = {response.infer_response.id: response for response in stream.rest()}
    assert len(responses) == 2 * len(bad)
    for identity, (_, says) in bad.items():
        assert says in responses[identity].error_message
        assert not responses[identity].infer_response.outputs
        assert_answers(1, responses[f"after {identity}"])
    assert stream.call.code() is grpc.StatusCode.OK


def test_bytes_that_do_not_parse_are_an_error_message(server: Served) -> None:
    method = server.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    requests = (b"\xff" * 20, oip.images(digits(1)).SerializeToString())
    responses = [pb.ModelStreamInferResponse.FromString(r) for r in method(iter(requests), timeout=PATIENCE_S)]
    responses.sort(key=lambda response: response.error_message)
    assert_answers(1, responses[0])
    assert "expected a serialised inference.ModelInferRequest" in responses[1].error_message


def test_a_client_may_ask_for_errors_as_status(serve: Serve, valve: Valve, talk: Talk) -> None:
    """Such an error ends the stream: pending messages are dropped."""
    served = serve(**UNHURRIED)
    with valve.closed():
        stream = talk(served, metadata=GRPC_ERRORS)
        stream.send(oip.images(DIGIT))
        valve.wait_for_engine()
        stream.send(oip.images(messages.random_digits(1, 7)))
        wait_for_queue(served, "digits", 7)
        stream.send(oip.images(DIGIT, "unknown"))
        assert_refused(lambda: next(stream), ModelNotFound, "no model 'unknown'")
        eventually(lambda: served.in_flight == 0, "the stream's calls ended")
    assert_serves(served)
    assert 7 not in valve.runs


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_a_client_that_goes_away_leaves_nothing_behind(serve: Serve, valve: Valve, way: str) -> None:
    """1. One message runs, others queue. 2. The client cancels or hangs up. 3. The queued ones are not computed."""
    served = serve(**UNHURRIED)
    with valve.closed():
        with served.another_connection() as connection:
            stream = Conversation(connection)
            stream.send(oip.images(DIGIT))
            valve.wait_for_engine()
            for number in range(20):
                stream.send(oip.images(messages.random_digits(number, 7)))
            wait_for_queue(served, "digits", 140)
            if way == "cancel":
                stream.call.cancel()
                eventually(lambda: served.in_flight == 0, "the stream's calls ended")
        stream.half_close()
        eventually(lambda: served.in_flight == 0, "the stream's calls ended")
        wait_for_queue(served, "digits", 0)
    assert_serves(served)
    assert set(valve.runs) == {1}
    eventually(lambda: "stream" not in {thread.name for thread in threading.enumerate()}, "the reader ended")


def test_a_client_that_only_sends_is_held_back(serve: Serve, valve: Valve, talk: Talk) -> None:
    """1. The engine is busy. 2. Of 400 messages the server reads one window, and refuses none. 3. All are answered."""
    served = serve(**UNHURRIED)
    with valve.closed():
        stream = talk(served)
        for number in range(400):
            stream.send(oip.images(digits(number)), str(number))
        eventually(lambda: served.in_flight == WINDOW, "the window is full")
        assert served.in_flight == WINDOW
    responses = stream.rest()
    assert len(responses) == 400
    for response in responses:
        assert_answers(int(response.infer_response.id), response)


def test_a_client_that_reads_no_answers_is_held_back(serve: Serve, talk: Talk) -> None:
    """Answers of 768 KiB that the client does not read fill the window. Then the server computes no more."""
    served = serve()
    photos = messages.random_photo(0, 512, 512)
    stream = talk(served)
    for number in range(WINDOW + 100):
        stream.send(oip.images(photos, "backbone"), str(number))

    def computed() -> float:
        return served.metric("rafaga_requests_total", method=f"{messages.OPEN}ModelInfer")

    eventually(lambda: computed() >= WINDOW, "a window's worth was computed")
    before = -1.0
    while (now := computed()) > before:
        before = now
        time.sleep(0.3)
    assert now < WINDOW + 40  # the window, and what fits into the buffers of the connection
    responses = stream.rest()
    assert {int(r.infer_response.id) for r in responses} == set(range(WINDOW + 100))


def test_an_oversize_message_ends_its_stream_alone(serve: Serve, talk: Talk) -> None:
    served = serve(max_request_bytes=10_000)
    good, bad = talk(served), talk(served)
    bad.send(oip.images(messages.random_digits(0, 20)))
    assert refusal(lambda: next(bad)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    good.ask(2)


def test_streams_beyond_the_limit_are_refused(serve: Serve, talk: Talk) -> None:
    served = serve()
    streams = [talk(served) for _ in range(MAX_STREAMS)]
    for stream in streams:
        stream.ask(1)
    assert_refused(lambda: next(talk(served)), QueueFull)
    assert_serves(served)
    assert streams[0].rest() == []

    def takes_another() -> bool:
        another = talk(served)
        another.send(oip.images(digits(1)))
        try:
            assert_answers(1, *another.rest())
        except grpc.RpcError:
            return False
        return True

    eventually(takes_another, "there is room again")


def test_an_idle_stream_does_not_hold_up_the_drain(serve: Serve, talk: Talk) -> None:
    served = serve()
    stream = talk(served)
    stream.ask(1)
    assert served.server.drain_and_stop()
    assert_refused(lambda: next(stream), Draining)


def test_messages_sent_before_the_drain_are_answered(serve: Serve, valve: Valve, talk: Talk) -> None:
    """1. Messages run and queue. 2. The server drains; a new message is refused. 3. The earlier ones are answered."""
    served = serve(**UNHURRIED)
    draining = threading.Thread(target=served.server.drain_and_stop)
    stream = talk(served)
    with valve.closed():
        stream.send(oip.images(digits(0)), "0")
        valve.wait_for_engine()
        stream.send(oip.images(digits(2)), "2")
        wait_for_queue(served, "digits", 3)
        draining.start()
        eventually(lambda: served.server.router._draining, "the server drains")
        stream.send(oip.images(digits(1)), "1")
        refused = next(stream)
        assert (refused.infer_response.id, "stopping" in refused.error_message) == ("1", True)
    assert_answers(0, next(stream))
    assert_answers(2, next(stream))
    draining.join(PATIENCE_S)
    assert not draining.is_alive()


def test_a_stream_needs_a_token_where_calls_do(serve: Serve, talk: Talk) -> None:
    served = serve(bearer_token_sha256=(hashlib.sha256(b"secret").hexdigest(),))
    assert_refused(lambda: next(talk(served)), Unauthenticated)
    stream = talk(served, metadata=(("authorization", "Bearer secret"),))
    stream.ask(1)
