"""A roll-out that ends between its blocks: cancelled, late, or without its model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from rafaga.bundle import ForecastSpec
from rafaga.errors import InvalidRequest, ModelNotReady
from rafaga.server.services.forecasting.options import Options
from rafaga.v1 import forecasting_pb2 as pb
from tests import bundles
from tests.integration.serving import PATIENCE_S, Served, assert_refused, eventually, serving, wait_for_queue
from tests.integration.valve import Valve

DEADLINE_S = 1.0
ROWS = 3


@pytest.fixture(scope="module")
def valve() -> Valve:
    return Valve()


@pytest.fixture(scope="module")
def served(valve: Valve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("forecasters")
    for name in ("series", "replaced"):
        bundles.publish_forecaster(root, name)
    with serving(root, engine_factory=valve.load) as served:
        yield served


def roll_out(served: Served, model: str = "series", timeout_s: float = PATIENCE_S) -> Any:
    """Of ten blocks, with ROWS series in each run."""
    request = pb.ForecastRequest(model=model, series=[pb.Series(values=[1, 2, 3])] * ROWS, horizon=10 * bundles.HORIZON)
    return served.forecasting.Forecast.future(request, timeout=timeout_s)


def blocks_run(served: Served, valve: Valve) -> int:
    """After others were answered, whose runs would have been behind a next block."""
    for _ in range(3):
        served.forecasting.Forecast(pb.ForecastRequest(model="series", history=[1, 2, 3]), timeout=PATIENCE_S)
    wait_for_queue(served, "series", 0)
    assert served.in_flight == 0
    return valve.runs.count(ROWS)


@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_it_ends_with_its_call(served: Served, valve: Valve, end: str) -> None:
    with valve.closed():
        call = roll_out(served, timeout_s=DEADLINE_S if end == "deadline" else PATIENCE_S)
        valve.wait_for_engine()
        valve.let_one_through()
        if end == "cancel":
            valve.wait_for_engine()
            call.cancel()
        else:
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: served.in_flight == 0, "the call ended")
    assert blocks_run(served, valve) in ([2] if end == "cancel" else [1, 2]), "the second was running"


def test_a_model_that_is_replaced_meanwhile(served: Served, valve: Valve) -> None:
    """As for one that is replaced while an image is decoded: the client may send the request again."""
    with valve.closed():
        call = roll_out(served, "replaced")
        valve.wait_for_engine()
        served.server.repository.model("replaced", 0).retire(replaced=True)
    assert_refused(lambda: call.result(PATIENCE_S), ModelNotReady, "send the request again")
    assert blocks_run(served, valve) == 1


def test_a_model_without_a_median_is_not_rolled_out() -> None:
    spec = ForecastSpec(
        min_history=2, max_history=8, max_horizon=4, quantile_levels=(0.6, 0.9), season=1, step="day", unit=""
    )
    assert Options.of(pb.ForecastRequest(horizon=4), spec).blocks == 1
    with pytest.raises(InvalidRequest, match="at most 4 steps, the model's, which gives no median to continue with"):
        Options.of(pb.ForecastRequest(horizon=5), spec)
