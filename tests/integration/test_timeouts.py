"""What a request of the Open Inference Protocol says of its own time and place: `timeout` and `priority`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from rafaga.inference import open_inference_pb2 as pb
from rafaga.priority import PRIORITY_KEY
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Served, eventually, refusal, wait_for_queue
from tests.integration.valve import Decoder, Valve

DIGIT = messages.random_digits(0)
SOON_US = 200_000
LATE = (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


def infer_soon(served: Served, images: np.ndarray = DIGIT) -> Any:
    return oip.stub(served).ModelInfer.future(oip.images(images, given={"timeout": SOON_US}))


def ended(call: Any) -> tuple[grpc.StatusCode, str | None]:
    refused = refusal(lambda: call.result(PATIENCE_S))
    return refused.code, refused.reason


def assert_serves(served: Served) -> None:
    eventually(lambda: served.in_flight == 0, "every call ended")
    found = oip.arrays(oip.stub(served).ModelInfer(oip.images(DIGIT), timeout=PATIENCE_S))["probabilities"]
    np.testing.assert_allclose(found, bundles.classify(DIGIT), atol=1e-5)


def test_in_the_queue_while_the_engine_is_busy(serve: Callable[..., Served], valve: Valve) -> None:
    """The engine does not come back, and those who wait hear in time all the same."""
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


def test_while_the_engine_computes(serve: Callable[..., Served], valve: Valve) -> None:
    served = serve()
    with valve.closed():
        late = infer_soon(served)
        valve.wait_for_engine()
        assert ended(late) == LATE
        eventually(lambda: served.in_flight == 0, "the call ended")
    assert_serves(served)


def test_while_an_image_is_decoded(serve: Callable[..., Served], valve: Valve, monkeypatch: pytest.MonkeyPatch) -> None:
    served, decoder = serve(), Decoder(monkeypatch)
    valve.runs.clear()
    request = oip.files(b"not looked at")
    request.parameters["timeout"].CopyFrom(oip.parameter(SOON_US))
    late = oip.stub(served).ModelInfer.future(request)
    decoder.wait_for_image()
    assert ended(late) == LATE
    decoder.go_on()
    assert_serves(served)
    assert valve.runs == [1]


def test_in_a_stream(serve: Callable[..., Served], valve: Valve) -> None:
    """One message is late; those beside it are answered, and the stream goes on."""
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


def test_priorities_in_the_metadata(serve: Callable[..., Served], valve: Valve) -> None:
    """As below, over both protocols, and `priority` of a request counts more than its metadata."""
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


def test_priorities(serve: Callable[..., Served], valve: Valve) -> None:
    """While the engine is busy come the lowest, one without priority, and the highest; they run the other way round.

    Their images differ in size, so that none shares another's batch.
    """
    served = serve(max_queue_wait_ms=600_000)

    def ask(rows: int, **given: object) -> Any:
        images = np.zeros((rows, 8 * rows, 8, 3), np.uint8)
        call = oip.stub(served).ModelInfer.future(oip.images(images, "backbone", given=given))
        calls.append(call)
        return call

    calls: list[Any] = []
    with valve.closed():
        ask(1)
        valve.wait_for_engine()
        waiting = 0
        for rows, priority in ((2, 3), (3, 10**9), (4, 0), (5, pb.InferParameter(uint64_param=1))):
            ask(rows, priority=priority)
            waiting += rows
            wait_for_queue(served, "backbone", waiting)
    assert all(call.result(PATIENCE_S) for call in calls)
    assert valve.runs == [1, 5, 4, 2, 3]
