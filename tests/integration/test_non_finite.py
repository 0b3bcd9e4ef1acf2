"""NaN as an output: the caller gets an error, unless the bundle allows it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rafaga import Client, NonFiniteOutput
from tests import bundles, plain
from tests.integration import messages
from tests.integration.rest import send, tensor
from tests.integration.serving import PATIENCE_S, Serve, Served, assert_refused, serving, wait_for_queue
from tests.integration.valve import Valve

HALVES = pytest.approx([0.25, 0.75])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("uneven")
    bundles.publish_uneven(root)
    bundles.publish_uneven(root, "tolerant", allow_non_finite=True)
    plain.publish(root, "plain", plain.model("(float[n,2] x) => (float[n,2] y) { y = Div(x, x) }"))
    return root


@pytest.fixture(scope="module")
def served(repository: Path) -> Iterator[Served]:
    with serving(repository) as served:
        yield served
        assert served.in_flight == 0


def pixels(*values: int) -> np.ndarray:
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1)


def test_it_is_an_error_of_its_own_kind(served: Served) -> None:
    def count() -> float:
        return served.metric("rafaga_non_finite_outputs_total", model="uneven")

    before = count()
    request = messages.classify(pixels(3, 0, 7), "uneven")
    says = "output probabilities is NaN or infinite for row 1 of this input"
    assert_refused(lambda: served.vision.Classify(request), NonFiniteOutput, says)
    with Client(served.address) as client, pytest.raises(NonFiniteOutput):
        client.classify(pixels(0)[0], model="uneven")
    answer = send(served, "/v2/models/uneven/infer", {"inputs": [tensor("image", pixels(0), "UINT8")]})
    assert (answer.status, "NaN or infinite for row 0" in answer.error) == (400, True)
    assert count() == before + 3
    found = served.vision.Classify(messages.classify(pixels(3, 7), "uneven"))
    assert messages.probabilities(found)[1] == HALVES


def test_where_the_bundle_or_a_plain_file_may_give_it(served: Served) -> None:
    answer = served.vision.Classify(messages.classify(pixels(0), "tolerant"))
    assert math.isnan(answer.results[0].labels[0].probability)
    with Client(served.address) as client:
        found = client.infer("plain", {"x": np.array([[0, 2]], np.float32)})["y"]
    np.testing.assert_array_equal(found, [[np.nan, 1]])
    assert served.metric("rafaga_non_finite_outputs_total", model="tolerant") == 0
    assert served.metric("rafaga_non_finite_outputs_total", model="plain") == 0


def test_the_others_of_the_batch_are_answered(serve: Serve, valve: Valve) -> None:
    """1. The engine is busy; six callers queue. 2. Their batch has NaN for one. 3. That one alone is refused."""
    served = serve()
    with valve.closed():
        first = served.vision.Classify.future(messages.classify(pixels(1), "uneven"))
        valve.wait_for_engine()
        futures = [served.vision.Classify.future(messages.classify(pixels(i), "uneven")) for i in (3, 5, 0, 7, 9, 11)]
        wait_for_queue(served, "uneven", 6)
    assert first.result(PATIENCE_S)
    assert_refused(lambda: futures.pop(2).result(PATIENCE_S), NonFiniteOutput)
    for future in futures:
        assert messages.probabilities(future.result(PATIENCE_S))[0] == HALVES
    assert served.in_flight == 0


def test_a_request_in_several_batches_is_refused_once(serve: Serve) -> None:
    served = serve(max_batch_size=4)
    values = np.arange(1, 11, dtype=np.uint8)
    values[[1, 8]] = 0
    assert_refused(lambda: served.vision.Classify(messages.classify(pixels(*values), "uneven")), NonFiniteOutput)
    assert served.metric("rafaga_non_finite_outputs_total", model="uneven") == 1
    assert served.vision.Classify(messages.classify(pixels(*range(1, 11)), "uneven"))
    assert served.in_flight == 0
