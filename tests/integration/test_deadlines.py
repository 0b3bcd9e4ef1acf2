"""Deadlines, timeouts and priorities: refused where they cannot be met, dropped where they were missed. Callers that
go away: their work is dropped where it can be, their state is freed, others go on."""

from __future__ import annotations

import gc
from typing import Any

import grpc
import numpy as np

from rafaga.errors import PUSHBACK_KEY
from rafaga.inference import open_inference_pb2 as pb
from rafaga.priority import PRIORITY_KEY
from rafaga.server.transport.router import Call
from tests import bundles
from tests.integration import http2, messages
from tests.integration import open_inference as oip
from tests.integration.serving import (
    PATIENCE_S,
    Serve,
    Served,
    Stubs,
    assert_serves,
    connected,
    eventually,
    refusal,
    refusal_of,
    wait_for_queue,
)
from tests.integration.valve import Valve

DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
SOON_US = 200_000
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


def test_n_and_two_at_once_into_a_queue_of_n(serve: Serve, valve: Valve) -> None:
    """Calls of both protocols share the queue. Exactly two are refused, and told when to come back in every way."""
    served = serve(max_queue_requests=3)
    kinds = [(served.vision.Classify, messages.classify(IMAGE)), (oip.stub(served).ModelInfer, oip.images(IMAGE))]
    with valve.closed():
        first = served.vision.Classify.future(messages.classify(IMAGE))
        valve.wait_for_engine()
        calls: list[Any] = [method.future(request) for method, request in (3 * kinds)[:5]]
        eventually(lambda: sum(call.done() for call in calls) == 2, "two are refused")
        wait_for_queue(served, "digits", 3)
        refused = [call for call in calls if call.done()]
    for call in refused:
        refusal = refusal_of(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert getattr(refusal.error, "retry_after_s", 0) > 0
        assert int(dict(call.trailing_metadata())[PUSHBACK_KEY]) > 0
    assert all(call.result(PATIENCE_S) for call in (first, *calls) if call not in refused)
    assert served.metric("rafaga_refusals_total") == served.metric("rafaga_refusals_total", reason="QUEUE_FULL") == 2
    eventually(lambda: served.in_flight == 0, "every call ended")
    assert served.metric("rafaga_requests_total", code="OK") == 4
    assert served.metric("rafaga_requests_total", code="RESOURCE_EXHAUSTED") == 2
    assert served.metric("rafaga_requests_total") == 6


def test_timeouts_in_the_queue_while_the_engine_is_busy(serve: Serve, valve: Valve) -> None:
    """The engine never returns, and waiting callers are answered in time."""
    served = serve(max_queue_wait_ms=600_000)
    infer = oip.stub(served).ModelInfer
    with valve.closed():
        first = infer.future(oip.images(IMAGE))
        valve.wait_for_engine()
        soon = {"timeout": SOON_US}
        late = [infer.future(oip.images(messages.random_digits(n, 7), given=soon)) for n in range(3)]
        patient = infer.future(oip.images(messages.random_digits(9, 2)))
        for call in late:
            refused = refusal(lambda call=call: call.result(PATIENCE_S))
            assert (refused.code, refused.reason) == (DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        wait_for_queue(served, "digits", 2)
        eventually(lambda: served.in_flight == 2, "only the patient are in flight")
        assert served.metric("rafaga_dropped_total", model="digits", cause="deadline") == 3
    assert first.result(PATIENCE_S)
    assert patient.result(PATIENCE_S)
    assert valve.runs == [1, 2]
    assert_serves(served)


def test_timeouts_in_a_stream(serve: Serve, valve: Valve) -> None:
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


def test_timeouts_of_any_size(server: Served) -> None:
    for timeout in (2**63 - 1, pb.InferParameter(uint64_param=2**64 - 1), 60_000_000, 0):
        response = oip.stub(server).ModelInfer(oip.images(IMAGE, given={"timeout": timeout}), timeout=PATIENCE_S)
        np.testing.assert_allclose(oip.arrays(response)["probabilities"], bundles.classify(IMAGE), atol=1e-5)


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


def test_a_priority_that_is_none(server: Served) -> None:
    for word in ("", "HIGH", "1"):
        given = {"metadata": ((PRIORITY_KEY, word),), "timeout": PATIENCE_S}
        refused = refusal(lambda given=given: server.vision.Classify(messages.classify(IMAGE), **given))
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert "expected high, normal, low, got" in refused.message
    assert_serves(server)


def test_a_cancel_between_the_parts_of_a_split_request(serve: Serve, valve: Valve) -> None:
    """The parts that are not in a batch yet are never run."""
    served = serve()
    with valve.closed():
        call = served.vision.Classify.future(messages.classify(messages.random_digits(1, 100)))
        valve.wait_for_engine()
        call.cancel()
        eventually(lambda: served.in_flight == 0, "the call ended")
        wait_for_queue(served, "digits", 0)
    assert_serves(served)
    assert valve.runs[0] <= 32
    assert set(valve.runs[1:]) == {1}, "those of `assert_serves`"


def test_a_connection_that_closes_cancels_its_calls(serve: Serve, valve: Valve) -> None:
    """Forty callers vanish, queued and computing; a neighbour's calls go on."""
    served = serve()
    with valve.closed():
        with connected(served.address) as channel:
            gone = [Stubs(channel).vision.Classify.future(messages.classify(IMAGE)) for _ in range(40)]
            valve.wait_for_engine()
            eventually(lambda: served.in_flight == 40, "all are there")
            neighbour = served.vision.Classify.future(messages.classify(IMAGE))
            eventually(lambda: served.in_flight == 41, "the neighbour too")
        eventually(lambda: served.in_flight == 1, "they are gone")
    assert all(future.code() is grpc.StatusCode.CANCELLED for future in gone)
    assert neighbour.result(PATIENCE_S)
    assert_serves(served)


def test_a_call_is_freed_when_it_ends_and_not_by_the_garbage_collector(server: Served) -> None:
    """Answered, refused or cancelled: its request may be large, and the collector comes round when it likes."""
    gc.collect()
    # Engines of servers that other tests share hold on to their last batch.
    others = _calls()
    gc.disable()
    try:
        for _ in range(20):
            server.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S)
            refusal(lambda: server.vision.Classify(messages.classify(IMAGE, model="unknown"), timeout=PATIENCE_S))
            server.vision.Classify.future(messages.classify(IMAGE)).cancel()
        # The threads that serve hold on to the last they saw.
        eventually(lambda: len(_calls()) <= len(others) + 3, "calls are freed")
    finally:
        gc.enable()


def _calls() -> list[object]:
    # By their type: isinstance asks objects for their class, and some of PyTorch's answer with a warning.
    return [o for o in gc.get_objects() if issubclass(type(o), Call)]
