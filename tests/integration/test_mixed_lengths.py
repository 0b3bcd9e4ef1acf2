"""Series of any length from many callers: answered as if alone, and little of what is computed is padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rafaga
from rafaga.errors import NonFiniteOutput
from rafaga.v1 import forecasting_pb2
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Served, assert_refused, serving

CALLERS = 32
SHORTEST, LONGEST = 24, 480  # of lstm-co2
MODEL = "lstm-co2"


def uniform(rng: np.random.Generator, count: int) -> Any:
    return rng.integers(SHORTEST, LONGEST, count, endpoint=True)


def heavy_tailed(rng: np.random.Generator, count: int) -> Any:
    """Most are short, a twentieth is as long as can be."""
    return np.minimum(SHORTEST * (1 + rng.pareto(1.0, count)), LONGEST).astype(int)


def histories(lengths: Callable[..., Any], count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [400 + rng.normal(size=n).cumsum() for n in lengths(rng, count)]


def several(*series: np.ndarray, model: str = MODEL) -> forecasting_pb2.ForecastRequest:
    return forecasting_pb2.ForecastRequest(model=model, series=[forecasting_pb2.Series(values=s) for s in series])


def rows(response: forecasting_pb2.ForecastResponse) -> np.ndarray:
    return np.array([[q.values for q in forecast.quantiles] for forecast in response.forecasts])


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(Path(rafaga.__file__).parent / "demo/models") as served:
        yield served
        assert served.in_flight == 0


@pytest.fixture
def wasted(served: Served) -> Callable[[], float]:
    """The share of padding in what was computed since the test began."""

    def counts() -> np.ndarray:
        names = ("rafaga_padding_rows_total", "rafaga_batch_size_sum")
        return np.array([served.metric(name, model=MODEL) for name in names])

    before = counts()

    def share() -> float:
        padding, computed = counts() - before
        return float(padding / computed)

    return share


@pytest.mark.parametrize("lengths", [uniform, heavy_tailed])
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=[pytest.mark.nightly, pytest.mark.timeout(900)])])
def test_answers_are_those_of_lone_calls(
    served: Served, wasted: Callable[[], float], lengths: Callable[..., Any], count: int
) -> None:
    every = histories(lengths, count)

    def ask(history: np.ndarray) -> tuple[np.ndarray, int]:
        response = served.forecasting.Forecast(messages.forecast(history, model=MODEL), timeout=PATIENCE_S)
        return messages.quantiles(response), response.timing.batch_size

    with ThreadPoolExecutor(CALLERS) as callers:
        together = list(callers.map(ask, every))
    padding = wasted()
    assert 0 < padding < 0.2
    assert max(size for _, size in together) > 2
    for history, (answer, _) in zip(every, together, strict=True):
        np.testing.assert_allclose(answer, ask(history)[0], rtol=1e-5)


def test_a_request_of_many_lengths(served: Served, wasted: Callable[[], float]) -> None:
    every = histories(uniform, 50)
    together = rows(served.forecasting.Forecast(several(*every)))
    assert 0 < wasted() < 0.2
    alone = [rows(served.forecasting.Forecast(several(history)))[0] for history in every]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_padding_of_the_callers_own_is_not_computed(served: Served, wasted: Callable[[], float]) -> None:
    """As Triton's clients send series: an array as long as the longest, and the lengths."""
    every = histories(uniform, 20)
    values = np.zeros((20, LONGEST), np.float32)
    for row, history in zip(values, every, strict=True):
        row[: len(history)] = history
    length = np.array([len(history) for history in every])

    def ask(rows: int) -> np.ndarray:
        return oip.answer(served, oip.request(MODEL, history=values[:rows], length=length[:rows]))["quantiles"]

    answer = ask(20)
    assert 0 < wasted() < 0.2
    alone = [rows(served.forecasting.Forecast(several(history)))[0].T for history in every]
    np.testing.assert_allclose(answer, alone, rtol=1e-5)
    np.testing.assert_allclose(ask(1), answer[:1], rtol=1e-5)


def test_errors_name_the_row_of_the_request(server: Served) -> None:
    """Not the one that it has in order of length. The sum of the bad series is infinite."""
    bad = np.full(3, 3e38)
    request = several(np.ones(2), bad, np.ones(60), bad, model="series")
    assert_refused(lambda: server.forecasting.Forecast(request), NonFiniteOutput, "for row 1, 3 of this input")
