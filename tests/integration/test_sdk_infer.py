"""`infer` of both clients against a real server: plain ONNX files and bundles, whatever their tensors."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from rafaga import AsyncClient, Client, InvalidRequest, InvalidTensor, ModelNotFound, RejectedByModel
from tests import bundles, plain
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, Served, serving
from tests.integration.test_open_inference_plain import GRAPHS

Infer = Callable[..., dict[str, np.ndarray]]
MAX_ROWS = 5


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Models for `infer`; a request has at most five rows and 2000 bytes."""
    root = tmp_path_factory.mktemp("infer")
    for dtype in plain.DTYPES:
        plain.publish(root, dtype, plain.identity(dtype, ("batch", 3)))
    plain.publish(root, "flat", plain.scaled(2, ("batch",)))
    plain.publish(root, "fixed", plain.scaled(2, (2, 3)))
    plain.publish(root, "scalar", plain.scaled(2, ()))
    plain.publish(root, "versioned", plain.scaled(2), version=1)
    plain.publish(root, "versioned", plain.scaled(3), version=2)
    for name in ("both", "table"):
        plain.publish(root, name, plain.model(GRAPHS[name]))
    bundles.publish_classifier(root)
    bundles.publish_forecaster(root)
    with serving(root, max_request_rows=MAX_ROWS, max_request_bytes=2000, model_versions="all") as served:
        yield served


@pytest.fixture(params=[Client, AsyncClient])
def infer(request: pytest.FixtureRequest, served: Served) -> Iterator[Infer]:
    """Of either client."""
    client = request.param(served.address, timeout_s=PATIENCE_S)
    with asyncio.Runner() as runner:

        def done(answer: Any) -> Any:
            return runner.run(answer) if inspect.iscoroutine(answer) else answer

        yield lambda *args, **options: done(client.infer(*args, **options))
        done(client.close())


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.address, timeout_s=PATIENCE_S) as client:
        yield client


@pytest.mark.parametrize("dtype", [dtype for dtype in plain.DTYPES if dtype not in ("string", "bool")])
def test_every_number_comes_back(client: Client, dtype: str) -> None:
    info: Any = np.finfo(dtype) if np.dtype(dtype).kind == "f" else np.iinfo(dtype)
    values = np.array([[info.min, 0, info.max], [1, 2, 3]], dtype)
    for given in (values, values.tolist(), np.asfortranarray(values)):
        found = client.infer(dtype, {"x": given})["y"]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, values)
        found[0, 0] = 1  # an array of the caller's own


def test_booleans_and_text_come_back(infer: Infer) -> None:
    mask = [[True, False, True]]
    assert infer("bool", {"x": mask})["y"].tolist() == mask
    words = [["", "a\0", "Ráfaga ☃"], ["x" * 1000, "\0", "b"]]
    for given in (words, np.array(words, dtype=object), [[word.encode() for word in row] for row in words]):
        assert infer("string", {"x": given})["y"].tolist() == words


def test_outputs_are_named_and_chosen(infer: Infer) -> None:
    a, b = np.arange(12.0).reshape(2, 2, 3)
    found = infer("both", {"a": a, "b": b})
    assert list(found) == ["sum", "difference"]
    np.testing.assert_array_equal(found["sum"], a + b)
    np.testing.assert_array_equal(found["difference"], a - b)
    assert list(infer("both", {"b": b, "a": a}, outputs=["difference"])) == ["difference"]


def test_shapes_are_those_of_the_graph(client: Client) -> None:
    assert client.infer("flat", {"x": [1, 2, 3]})["y"].tolist() == [2, 4, 6]
    assert client.infer("fixed", {"x": np.ones((2, 3))})["y"].tolist() == [[2] * 3] * 2
    assert client.infer("scalar", {"x": 4})["y"] == 8


def test_versions(infer: Infer) -> None:
    x = np.ones((1, 3), np.float32)
    assert [infer("versioned", {"x": x}, version=version)["y"][0, 0] for version in (None, 0, 1, 2)] == [3, 3, 2, 3]
    with pytest.raises(ModelNotFound):
        infer("versioned", {"x": x}, version=7)


@pytest.mark.parametrize("rows", [MAX_ROWS + 1, 100])
def test_more_rows_than_a_request_or_a_batch_may_have(infer: Infer, rows: int) -> None:
    a, b = np.random.default_rng(rows).normal(size=(2, rows, 3)).astype(np.float32)
    found = infer("both", {"a": a, "b": b})
    np.testing.assert_array_equal(found["sum"], a + b)
    np.testing.assert_array_equal(found["difference"], a - b)
    assert infer("flat", {"x": np.arange(rows)})["y"].tolist() == [2 * i for i in range(rows)]
    words = [[f"{i}", "", "x"] for i in range(rows)]
    assert infer("string", {"x": words})["y"].tolist() == words


def test_the_row_that_the_model_rejects_is_named(infer: Infer) -> None:
    index = np.arange(100) % 4
    index[17] = 200
    with pytest.raises(RejectedByModel, match="idx=200") as raised:
        infer("table", {"index": index})
    assert raised.value.__notes__ == ["input 17"]


def test_bundles_take_tensors_too(infer: Infer) -> None:
    """1. An image model takes pixels (here more bytes than a request may have), or files as bytes. 2. A forecaster's
    lengths are optional."""
    pixels = messages.random_digits(1, rows=3)
    expected = bundles.classify(pixels)
    for image in (pixels, [messages.png(row[:, :, 0]) for row in pixels]):
        np.testing.assert_allclose(infer("digits", {"image": image})["probabilities"], expected, atol=1e-5)
    history = messages.random_history(4, 12)
    found = infer("series", {"history": [history]})
    np.testing.assert_allclose(found["quantiles"][0], bundles.forecast(history), rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        ("float32", {"z": np.zeros((1, 3))}, "expected the inputs x; got z"),
        ("float32", {"x": np.zeros((1, 4))}, r"input x: expected a tensor of shape \[N, 3\], got \[1, 4\]"),
        ("float32", {"x": np.zeros((100, 4))}, r"input x: expected a tensor of shape \[N, 3\]"),
        ("float32", {"x": ["a", "b", "c"]}, "input x: expected datatype FP32, got 'BYTES'"),
        ("both", {"a": np.zeros((1, 3)), "b": np.zeros((2, 3))}, "equally many rows"),
    ],
)
def test_what_does_not_fit_is_refused(client: Client, model: str, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidTensor, match=message):
        client.infer(model, inputs)


def test_an_unknown_output(infer: Infer) -> None:
    with pytest.raises(InvalidRequest, match="no output 'z'; available: y"):
        infer("float32", {"x": np.zeros((1, 3))}, outputs=["z"])
