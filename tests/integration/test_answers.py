"""Answers are numpy's, alone and in batches: other requests, even failing ones, do not change them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from rafaga.v1 import catalog_pb2
from tests import bundles
from tests.bundles import fragile
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Serve, Served, refusal, wait_for_queue
from tests.integration.valve import Valve

CALLERS = 32
OUT_OF_RANGE = 200


def pixel(value: int, rows: int = 1) -> np.ndarray:
    """Images for fragile, which refuses values out of its range."""
    return np.full((rows, 1, 1, 1), value, np.uint8)


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_classify_answers_what_numpy_answers(server: Served, rows: int) -> None:
    images = messages.random_digits(rows, rows)
    response = server.vision.Classify(messages.classify(images))
    assert messages.probabilities(response) == pytest.approx(bundles.classify(images), abs=1e-5)
    assert (response.model.name, response.model.version) == ("digits", 1)
    assert response.model.trained
    assert response.model.precision == "fp32"
    assert response.timing.batch_size == rows
    assert response.timing.inference_us > 0
    assert response.timing.preprocess_us == 0


@pytest.mark.parametrize(("asked", "given"), [(0, 5), (1, 1), (10, 10), (11, 10), (2**32 - 1, 10)])
def test_labels_come_best_first_zero_means_five_and_too_many_all(server: Served, asked: int, given: int) -> None:
    images = messages.random_digits(7, 4)
    response = server.vision.Classify(messages.classify(images, top_k=asked))
    for result, expected in zip(response.results, bundles.classify(images), strict=True):
        best = np.argsort(-expected, kind="stable")[:given]
        assert [(label.index, label.label) for label in result.labels] == [(i, f"digit {i}") for i in best]


def test_equal_probabilities_come_in_the_order_of_their_index(server: Served) -> None:
    """fragile answers one-hot: nine classes of equal probability."""
    response = server.vision.Classify(messages.classify(pixel(4), model="fragile"))
    assert [label.index for label in response.results[0].labels] == [4, 0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_a_least_probability_takes_all_labels_above_it_or_the_best_of_them(server: Served) -> None:
    images = messages.random_digits(7, 4)
    found = server.vision.Classify(messages.classify(images, top_k=0, min_probability=0.02)).results
    for result, expected in zip(found, bundles.classify(images), strict=True):
        assert {label.index for label in result.labels} == set(np.flatnonzero(expected >= 0.02).tolist())
    assert max(len(result.labels) for result in found) > 5
    best = server.vision.Classify(messages.classify(images, top_k=2, min_probability=0.02)).results
    assert [list(result.labels) for result in best] == [list(result.labels)[:2] for result in found]
    (nothing,) = server.vision.Classify(messages.classify(images[:1], min_probability=1)).results
    assert not nothing.labels


@pytest.mark.parametrize(("height", "width", "rows"), [(1, 1, 1), (32, 48, 2), (33, 17, 1)])
def test_features_of_any_size_are_what_numpy_answers(server: Served, height: int, width: int, rows: int) -> None:
    images = messages.random_photo(0, height, width, rows)
    response = server.vision.ExtractFeatures(messages.features(images))
    (found,) = messages.maps(response)
    assert (response.maps[0].name, response.maps[0].stride) == ("map", 2)
    np.testing.assert_allclose(found, bundles.features(images), atol=1e-6)


@pytest.mark.parametrize(("length", "horizon"), [(2, 0), (6, 1), (64, 4), (100, 3)])
def test_forecast_answers_what_numpy_answers(server: Served, length: int, horizon: int) -> None:
    """Zero asks for the whole horizon; of a longer history the newest 64 observations count."""
    history = messages.random_history(length, length)
    response = server.forecasting.Forecast(messages.forecast(history, horizon))
    expected = bundles.forecast(history[-64:])[: horizon or bundles.HORIZON]
    assert messages.quantiles(response) == pytest.approx(expected, abs=1e-4)
    assert [q.level for q in response.quantiles] == pytest.approx(bundles.LEVELS)


def test_good_answers_stay_right_while_others_fail(server: Served) -> None:
    """32 callers at once; every third request is bad, in one of several ways, and fails alone."""
    bad = [
        (messages.classify(messages.random_digits(0), model="unknown"), grpc.StatusCode.NOT_FOUND),
        (messages.classify(np.zeros((1, 27, 28, 1), np.uint8)), grpc.StatusCode.INVALID_ARGUMENT),
        (messages.classify_files(b"no image"), grpc.StatusCode.INVALID_ARGUMENT),
        (messages.classify(pixel(OUT_OF_RANGE), model="fragile"), grpc.StatusCode.INVALID_ARGUMENT),
    ]

    def ask(number: int) -> None:
        if number % 3 == 2:
            request, code = bad[number // 3 % len(bad)]
            refused = refusal(lambda: server.vision.Classify(request, timeout=PATIENCE_S))
            assert refused.code is code
            assert refused.reason
        elif number % 3:
            history = messages.random_history(number, 2 + number % 60)
            forecast = server.forecasting.Forecast(messages.forecast(history), timeout=PATIENCE_S)
            assert messages.quantiles(forecast) == pytest.approx(bundles.forecast(history), abs=1e-4)
        else:
            images = messages.random_digits(number, 1 + number % 4)
            response = server.vision.Classify(messages.classify(images), timeout=PATIENCE_S)
            assert messages.probabilities(response) == pytest.approx(bundles.classify(images), abs=1e-5)

    with ThreadPoolExecutor(CALLERS) as callers:
        assert len(list(callers.map(ask, range(10 * CALLERS)))) == 10 * CALLERS


def calls_while_the_engine_runs(served: Served, valve: Valve, method: Any, requests: list[Any]) -> list[Any]:
    """The engine runs the first; all others, of a row each, are in the queue before it goes on."""
    with valve.closed():
        first = method.future(requests[0])
        valve.wait_for_engine()
        others = [method.future(request) for request in requests[1:]]
        wait_for_queue(served, requests[0].model, len(others))
    assert first.result(PATIENCE_S)
    return [first, *others]


def test_callers_that_come_while_the_engine_runs_share_a_batch(serve: Serve, valve: Valve) -> None:
    served = serve()
    images = messages.random_digits(5, 9)
    requests = [messages.classify(images[i : i + 1]) for i in range(9)]
    answers = [f.result() for f in calls_while_the_engine_runs(served, valve, served.vision.Classify, requests)]
    assert valve.runs == [1, 8]
    assert {answer.timing.batch_size for answer in answers[1:]} == {8}
    found = np.concatenate([messages.probabilities(answer) for answer in answers])
    assert found == pytest.approx(bundles.classify(images), abs=1e-5)


def test_images_of_different_sizes_do_not_share_a_batch(serve: Serve, valve: Valve) -> None:
    served = serve()
    photos = [messages.random_photo(i, 8 + 8 * (i % 2), 8) for i in range(7)]
    requests = [messages.features(photo) for photo in photos]
    calls = calls_while_the_engine_runs(served, valve, served.vision.ExtractFeatures, requests)
    for call, photo in zip(calls, photos, strict=True):
        np.testing.assert_allclose(messages.maps(call.result(PATIENCE_S))[0], bundles.features(photo), atol=1e-6)
    assert valve.runs == [1, 3, 3]


def test_a_request_larger_than_a_batch_is_split_and_comes_back_in_order(serve: Serve, valve: Valve) -> None:
    served = serve()
    images = messages.random_digits(6, 100)
    valve.runs.clear()
    response = served.vision.Classify(messages.classify(images))
    assert messages.probabilities(response) == pytest.approx(bundles.classify(images), abs=1e-5)
    assert sum(valve.runs) == 100
    assert len(valve.runs) >= 4
    assert response.timing.batch_size == max(valve.runs) <= 32


def test_two_engines_run_at_once(serve: Serve, valve: Valve) -> None:
    served = serve(instances=("2",), max_batch_size=2)
    assert served.catalog.GetModel(catalog_pb2.GetModelRequest(name="digits")).model.instances == 2
    images = messages.random_digits(0, 6)
    with valve.closed():
        calls = [served.vision.Classify.future(messages.classify(images[:1]))]
        valve.wait_for_engine()
        calls += [served.vision.Classify.future(messages.classify(images[i : i + 1])) for i in range(1, 6)]
        valve.wait_for_engine()
    found = np.concatenate([messages.probabilities(call.result(PATIENCE_S)) for call in calls])
    assert found == pytest.approx(bundles.classify(images), abs=1e-5)


@pytest.mark.parametrize("failing", [{0}, {7}, {3, 4}, {0, 2, 4, 6}, set(range(8))])
def test_only_the_failing_inputs_of_a_batch_fail(serve: Serve, valve: Valve, failing: set[int]) -> None:
    """1. The engine is busy; eight callers queue. 2. Their batch fails. 3. Exactly the bad ones are refused."""
    served = serve()
    inputs = [pixel(OUT_OF_RANGE if i in failing else i) for i in range(8)]
    requests = [messages.classify(image, "fragile") for image in (pixel(1), *inputs)]
    _, *calls = calls_while_the_engine_runs(served, valve, served.vision.Classify, requests)
    for index, call in enumerate(calls):
        if index in failing:
            assert refusal(lambda call=call: call.result(PATIENCE_S)).reason == "REJECTED_BY_MODEL"
        else:
            assert messages.probabilities(call.result(PATIENCE_S)) == pytest.approx(fragile(inputs[index]))
    assert served.metric("rafaga_rejected_inputs_total", model="fragile") == len(failing)
    (found,) = oip.stub(served).ModelStatistics(oip.pb.ModelStatisticsRequest(name="fragile")).model_stats
    counts = found.inference_stats
    assert (counts.success.count, counts.fail.count) == (9 - len(failing), len(failing))
    assert served.metric("rafaga_engine_failures_total", model="fragile") == 0
    assert served.in_flight == 0


def test_a_split_request_with_one_failing_row_fails_once(serve: Serve) -> None:
    """Its other parts ran or will run; nothing of it is answered, and its neighbours are."""
    served = serve(max_batch_size=4)
    images = pixel(2, 10)
    images[5] = OUT_OF_RANGE
    refused = refusal(lambda: served.vision.Classify(messages.classify(images, "fragile"), timeout=PATIENCE_S))
    assert refused.reason == "REJECTED_BY_MODEL"
    response = served.vision.Classify(messages.classify(pixel(9, 10), "fragile"))
    assert messages.probabilities(response) == pytest.approx(fragile(pixel(9, 10)))
    assert served.in_flight == 0
