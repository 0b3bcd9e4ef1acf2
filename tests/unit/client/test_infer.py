"""`infer` of both clients: batches, deadlines, and a model that changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rafaga import Client, DeadlineExceeded, InvalidTensor, ModelNotFound
from rafaga.inference import open_inference_pb2 as pb
from rafaga.v1 import catalog_pb2
from tests.unit.client.fake_server import Script

Infer = Callable[..., np.ndarray]


@pytest.fixture
def infer(either: Any) -> Infer:
    """The image that comes back."""
    return lambda image, **options: either.infer("lenet5-mnist", {"image": image}, **options)["image"]


def sent(script: Script) -> list[pb.ModelInferRequest]:
    return [request for request in script.requests if isinstance(request, pb.ModelInferRequest)]


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
    for _ in range(2):
        assert infer([[3]]).dtype == np.float32
    assert len(script.requests) - len(sent(script)) == 2


def test_a_model_that_is_loading_is_described_again(infer: Infer, script: Script) -> None:
    script.states["lenet5-mnist"] = catalog_pb2.Model.LOADING
    for _ in range(2):
        infer([[1]])
    assert len(script.requests) - len(sent(script)) == 2


def test_an_unknown_model(client: Client) -> None:
    with pytest.raises(ModelNotFound):
        client.infer("absent", {"x": [1]})
