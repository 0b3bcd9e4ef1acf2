"""Deadlines, timeouts and priorities: refused where they cannot be met, dropped where they were missed."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from rafaga.errors import PUSHBACK_KEY
from rafaga.inference import open_inference_pb2 as pb
from rafaga.priority import PRIORITY_KEY
from tests import bundles
from tests.integration import http2, messages
from tests.integration import open_inference as oip
from tests.integration.serving import (
    PATIENCE_S,
    Serve,
    Served,
    assert_serves,
    eventually,
    refusal,
    refusal_of,
    wait_for_queue,
)
from tests.integration.valve import Valve

DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
SOON_S = 0.3
CLASSIFY = "/rafaga.v1.Vision/Classify"
IMAGE = messages.random_digits(0)


def test_the_server_keeps_a_deadline_whose_caller_does_not(serve: Serve, valve: Valve) -> None:
    """The client neither cancels nor leaves; its call still ends, while the engine is still running it."""
    served = serve()
    with valve.closed(), http2.raw_connection(served.port) as connection:
        connection.send(http2.call(1, CLASSIFY, messages.classify(IMAGE), ("grpc-timeout", "300m")))
        valve.wait_for_engine()
        assert connection.until_stream_ends(1)
        eventually(lambda: served.in_flight == 0, "the call ended")
    assert_serves(served)


def test_an_unreachable_deadline_is_refused_at_arrival(serve: Serve, valve: Valve) -> None:
    served = serve(max_queue_wait_ms=10 * 60_000)
    served.predict("digits", seconds=100.0)
    with valve.closed():
        first = served.vision.Classify.future(messages.classify(IMAGE))
        valve.wait_for_engine()
        refused = refusal(lambda: served.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S))
        assert (refused.code, refused.reason) == (DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE")
    assert first.result(PATIENCE_S)
    assert served.metric("rafaga_refusals_total", reason="DEADLINE_UNREACHABLE") == 1
    assert served.in_flight == 0


@pytest.mark.parametrize("protocol", ["rafaga.v1", "inference"])
def test_n_and_two_at_once_into_a_queue_of_n(serve: Serve, valve: Valve, protocol: str) -> None:
    """Exactly two are refused, and told when to come back in every way."""
    served = serve(max_queue_requests=3)

    def ask() -> Any:
        if protocol == "inference":
            return oip.stub(served).ModelInfer.future(oip.images(IMAGE))
        return served.vision.Classify.future(messages.classify(IMAGE))

    with valve.closed():
        first = ask()
        valve.wait_for_engine()
        calls = [ask() for _ in range(5)]
        eventually(lambda: sum(call.done() for call in calls) == 2, "two are refused")
        wait_for_queue(served, "digits", 3)
        refused = [call for call in calls if call.done()]
    for call in refused:
        refusal = refusal_of(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert getattr(refusal.error, "retry_after_s", 0) > 0
        assert int(dict(call.trailing_metadata())[PUSHBACK_KEY]) > 0
    answered = [first, *(call for call in calls if call not in refused)]
    for call in answered:
        if protocol == "inference":
            found = oip.arrays(call.result(PATIENCE_S))["probabilities"]
        else:
            found = messages.probabilities(call.result(PATIENCE_S))
        np.testing.assert_allclose(found, bundles.classify(IMAGE), atol=1e-5)
    assert served.metric("rafaga_refusals_total") == served.metric("rafaga_refusals_total", reason="QUEUE_FULL") == 2
    eventually(lambda: served.in_flight == 0, "every call ended")
    assert served.metric("rafaga_requests_total", code="OK") == 4
    assert served.metric("rafaga_requests_total", code="RESOURCE_EXHAUSTED") == 2
    assert served.metric("rafaga_requests_total") == 6


DIGIT = messages.random_digits(0)
SOON_US = 200_000
LATE = (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


def infer_soon(served: Served, images: np.ndarray = DIGIT) -> Any:
    return oip.stub(served).ModelInfer.future(oip.images(images, given={"timeout": SOON_US}))


def ended(call: Any) -> tuple[grpc.StatusCode, str | None]:
    refused = refusal(lambda: call.result(PATIENCE_S))
    return refused.code, refused.reason


def test_in_the_queue_while_the_engine_is_busy(serve: Serve, valve: Valve) -> None:
    """The engine never returns, and waiting callers are answered in time."""
    served = serve(max_queue_wait_ms=600_000)
    with valve.closed():
        first = oip.stub(served).ModelInfer.future(oip.images(DIGIT))
        valve.wait_for_engine()
        late = [infer_soon(served, messages.random_digits(n, 7)) for n in range(3)]
        patient = oip.stub(served).ModelInfer.future(oip.images(messages.random_digits(9, 2)))
        assert [ended(call) for call in late] == [LATE] * 3
        wait_for_queue(served, "digits", 2)
        eventually(lambda: served.in_flight == 2, "only the patient are in flight")
        assert served.metric("rafaga_dropped_total", model="digits", cause="deadline") == 3
    assert first.result(PATIENCE_S)
    assert patient.result(PATIENCE_S)
    assert valve.runs == [1, 2]
    assert_serves(served)


def test_in_a_stream(serve: Serve, valve: Valve) -> None:
    """One message is late; the others are answered, and the stream goes on."""
    served = serve(max_queue_wait_ms=600_000)
    requests = [oip.images(messages.random_digits(n)) for n in range(3)]
    for number, request in enumerate(requests):
        request.id = str(number)
    requests[1].parameters["timeout"].CopyFrom(oip.parameter(SOON_US))
    with valve.closed():
        answers = oip.stub(served).ModelStreamInfer(iter(requests), timeout=PATIENCE_S)
        late = next(answers)
        assert "timeout has passed" in late.error_message
        assert late.infer_response.id == "1"
    rest = {answer.infer_response.id: answer.error_message for answer in answers}
    assert rest == {"0": "", "2": ""}
    assert_serves(served)


def test_whatever_its_size(server: Served) -> None:
    for timeout in (2**63 - 1, pb.InferParameter(uint64_param=2**64 - 1), 60_000_000, 0):
        response = oip.stub(server).ModelInfer(oip.images(DIGIT, given={"timeout": timeout}), timeout=PATIENCE_S)
        np.testing.assert_allclose(oip.arrays(response)["probabilities"], bundles.classify(DIGIT), atol=1e-5)


def test_priorities_in_the_metadata(serve: Serve, valve: Valve) -> None:
    """While the engine is busy come requests of all priorities, by metadata and by `priority`, which counts more; they
    run in the order of their priority. Their images differ in size, so that none shares another's batch."""
    served = serve(max_queue_wait_ms=600_000)

    def ask(rows: int, word: str, **given: object) -> Any:
        images, metadata = np.zeros((rows, 8 * rows, 8, 3), np.uint8), ((PRIORITY_KEY, word),)
        if given:
            return oip.stub(served).ModelInfer.future(oip.images(images, "backbone", given=given), metadata=metadata)
        return served.vision.ExtractFeatures.future(messages.features(images), metadata=metadata)

    calls: list[Any] = []
    with valve.closed():
        calls.append(ask(1, "low"))
        valve.wait_for_engine()
        waiting = 0
        for rows, word, given in ((2, "low", {}), (3, "high", {"priority": 3}), (4, "normal", {}), (5, "high", {})):
            calls.append(ask(rows, word, **given))
            waiting += rows
            wait_for_queue(served, "backbone", waiting)
    assert all(call.result(PATIENCE_S) for call in calls)
    assert valve.runs == [1, 5, 4, 2, 3]


@pytest.mark.parametrize("word", ["", "HIGH", "1"])
def test_a_priority_that_is_none(server: Served, word: str) -> None:
    request = messages.classify(DIGIT)
    refused = refusal(lambda: server.vision.Classify(request, metadata=((PRIORITY_KEY, word),), timeout=PATIENCE_S))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert "expected high, normal, low, got" in refused.message
    assert_serves(server)
