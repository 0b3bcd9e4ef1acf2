"""The caller's deadline: refused where it cannot be met, dropped where it was missed, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from rafaga.errors import PUSHBACK_KEY
from tests import bundles
from tests.integration import http2, messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Served, eventually, refusal, refusal_of, wait_for_queue
from tests.integration.valve import Valve

DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
SOON_S = 0.3
CLASSIFY = "/rafaga.v1.Vision/Classify"
IMAGE = messages.random_digits(0)


def assert_serves(served: Served) -> None:
    """A good request is answered rightly, and nobody else is in flight."""
    eventually(lambda: served.in_flight == 0, "every call ended")
    answer = served.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S)
    assert messages.probabilities(answer) == pytest.approx(bundles.classify(IMAGE), abs=1e-5)


def test_the_server_keeps_a_deadline_whose_caller_does_not(serve: Callable[..., Served], valve: Valve) -> None:
    """The client neither cancels nor leaves; its call ends all the same, while the engine is still at it."""
    served = serve()
    with valve.closed(), http2.raw_connection(served.port) as connection:
        connection.send(http2.call(1, CLASSIFY, messages.classify(IMAGE), ("grpc-timeout", "300m")))
        valve.wait_for_engine()
        assert connection.until_stream_ends(1)
        eventually(lambda: served.in_flight == 0, "the call ended")
    assert_serves(served)


def test_an_unreachable_deadline_is_refused_at_arrival(serve: Callable[..., Served], valve: Valve) -> None:
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


def test_a_full_queue_refuses_and_tells_when_to_come_back(serve: Callable[..., Served], valve: Valve) -> None:
    served = serve(max_queue_wait_ms=1000)
    served.predict("digits", seconds=100.0)
    with valve.closed():
        first = served.vision.Classify.future(messages.classify(IMAGE))
        valve.wait_for_engine()
        refused = refusal(lambda: served.vision.Classify(messages.classify(IMAGE)))
        assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert getattr(refused.error, "retry_after_s", 0) > 0
    assert first.result(PATIENCE_S)


def test_a_queue_of_n_refuses_exactly_what_is_beyond(serve: Callable[..., Served], valve: Valve) -> None:
    served = serve(max_queue_requests=3)
    with valve.closed():
        first = served.vision.Classify.future(messages.classify(IMAGE))
        valve.wait_for_engine()
        queued = []
        for place in range(1, 4):
            queued.append(served.vision.Classify.future(messages.classify(IMAGE)))
            wait_for_queue(served, "digits", place)
        for _ in range(2):
            assert refusal(lambda: served.vision.Classify(messages.classify(IMAGE))).reason == "QUEUE_FULL"
    assert all(future.result(PATIENCE_S).results for future in (first, *queued))
    assert served.metric("rafaga_refusals_total") == 2
    assert served.metric("rafaga_requests_total", code="OK") == 4


@pytest.mark.parametrize("protocol", ["rafaga.v1", "inference"])
def test_n_and_two_at_once_into_a_queue_of_n(serve: Callable[..., Served], valve: Valve, protocol: str) -> None:
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
