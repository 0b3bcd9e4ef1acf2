"""`infer` of both clients: retries and deadlines, and a model that changes."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from rafaga import AsyncClient, Client, DeadlineExceeded, Draining, InvalidTensor, ModelNotFound, Priority, QueueFull
from rafaga.inference import open_inference_pb2 as pb
from rafaga.v1 import catalog_pb2
from tests.unit.client.conftest import QUICK
from tests.unit.client.fake_server import Script

Infer = Callable[..., np.ndarray]


@pytest.fixture(params=[Client, AsyncClient])
def infer(request: pytest.FixtureRequest, address: str) -> Iterator[Infer]:
    """The image that comes back, by one client of either kind."""
    client = request.param(address, retry=QUICK, token="secret", priority=Priority.LOW)
    with asyncio.Runner() as runner:

        def done(answer: Any) -> Any:
            return runner.run(answer) if inspect.iscoroutine(answer) else answer

        yield lambda image, **options: done(client.infer("lenet5-mnist", {"image": image}, **options))["image"]
        done(client.close())


def sent(script: Script) -> list[pb.ModelInferRequest]:
    return [request for request in script.requests if isinstance(request, pb.ModelInferRequest)]


def test_refusals_are_tried_again(infer: Infer, script: Script) -> None:
    assert infer([[1]]).tolist() == [[1]]
    script.failures.extend([QueueFull("full", retry_after_s=0.001), Draining("stopping")])
    assert infer([[7]]).tolist() == [[7]]
    assert len(sent(script)) == 4
    assert script.metadata[-1]["authorization"] == "Bearer secret"
    assert script.metadata[-1]["rafaga-priority"] == "low"


def test_the_deadline_is_the_callers(infer: Infer, script: Script) -> None:
    infer([[1]])
    script.delay_s = 30
    with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
        infer([[7]], timeout_s=0.2)


def test_many_rows_come_back_in_order(infer: Infer, script: Script) -> None:
    rows = np.arange(100, dtype=np.uint8)
    assert infer(rows).tolist() == rows.tolist()
    assert sorted(request.inputs[0].shape[0] for request in sent(script)) == [4, 32, 32, 32], "a batch has 32"


def test_a_model_may_change(infer: Infer, script: Script) -> None:
    """The description is asked once, and again after an input that does not fit."""
    assert infer([[1]]).dtype == np.uint8
    script.dtype = "float32"
    with pytest.raises(InvalidTensor):
        infer([[2]])
    assert infer([[3]]).dtype == np.float32
    assert infer([[4]]).dtype == np.float32
    assert len(script.requests) - len(sent(script)) == 2


def test_a_model_that_is_loading_is_described_again(infer: Infer, script: Script) -> None:
    script.states["lenet5-mnist"] = catalog_pb2.Model.LOADING
    for _ in range(2):
        infer([[1]])
    assert len(script.requests) - len(sent(script)) == 2


def test_an_unknown_model(client: Client) -> None:
    with pytest.raises(ModelNotFound):
        client.infer("absent", {"x": [1]})
