"""An input that makes the engine fail fails alone, whoever shared its batch."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import numpy as np
import pytest

from tests.integration import messages
from tests.integration.graphs import fragile
from tests.integration.serving import PATIENCE_S, Served, refusal, wait_for_queue
from tests.integration.valve import Valve

OUT_OF_RANGE = 200


def pixel(value: int, rows: int = 1) -> np.ndarray:
    return np.full((rows, 1, 1, 1), value, np.uint8)


def test_the_input_that_fails_says_so_and_the_next_is_answered(server: Served) -> None:
    refused = refusal(lambda: server.vision.Classify(messages.classify(pixel(OUT_OF_RANGE), "fragile")))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REJECTED_BY_MODEL")
    assert refused.message == (
        "the model fails on this input: Gather: indices element out of data bounds, "
        "idx=200 must be within the inclusive range [-10,9]"
    )
    response = server.vision.Classify(messages.classify(pixel(3), "fragile"))
    assert messages.probabilities(response) == pytest.approx(fragile(pixel(3)))


@pytest.mark.parametrize("failing", [{0}, {7}, {3, 4}, {0, 2, 4, 6}, set(range(8))])
def test_only_the_failing_inputs_of_a_batch_fail(serve: Callable[..., Served], valve: Valve, failing: set[int]) -> None:
    """1. The engine is busy; eight callers queue. 2. Their batch fails. 3. Exactly the bad ones are refused."""
    served = serve()
    inputs = [pixel(OUT_OF_RANGE if i in failing else i) for i in range(8)]
    with valve.closed():
        first = served.vision.Classify.future(messages.classify(pixel(1), "fragile"))
        valve.wait_for_engine()
        futures = [served.vision.Classify.future(messages.classify(i, "fragile")) for i in inputs]
        wait_for_queue(served, "fragile", len(inputs))
    assert first.result(PATIENCE_S)
    for index, future in enumerate(futures):
        if index in failing:
            assert refusal(lambda future=future: future.result(PATIENCE_S)).reason == "REJECTED_BY_MODEL"
        else:
            answer = messages.probabilities(future.result(PATIENCE_S))
            assert answer == pytest.approx(fragile(inputs[index]))
    assert served.metric("rafaga_rejected_inputs_total", model="fragile") == len(failing)
    assert served.metric("rafaga_engine_failures_total", model="fragile") == 0
    assert served.in_flight == 0


def test_a_split_request_with_one_failing_row_fails_once(serve: Callable[..., Served]) -> None:
    """Its other parts ran or will run; nothing of it is answered, and its neighbours are."""
    served = serve(max_batch_size=4)
    images = pixel(2, 10)
    images[5] = OUT_OF_RANGE
    refused = refusal(lambda: served.vision.Classify(messages.classify(images, "fragile"), timeout=PATIENCE_S))
    assert refused.reason == "REJECTED_BY_MODEL"
    response = served.vision.Classify(messages.classify(pixel(9, 10), "fragile"))
    assert messages.probabilities(response) == pytest.approx(fragile(pixel(9, 10)))
    assert served.in_flight == 0
