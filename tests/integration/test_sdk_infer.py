"""`infer` of both clients against a real server: plain ONNX files and bundles, whatever their tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rafaga import InvalidRequest, InvalidTensor, ModelNotFound, RejectedByModel
from tests import bundles, plain
from tests.integration import messages
from tests.integration.serving import Served, serving
from tests.integration.test_open_inference_plain import GRAPHS, SHAPES, extremes

MAX_ROWS = 5


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Models for `infer`; a request has at most five rows and 2000 bytes."""
    root = tmp_path_factory.mktemp("infer")
    for dtype in plain.DTYPES:
        plain.publish(root, dtype, plain.identity(dtype, ("batch", 3)))
    for name in ("flat", "fixed", "scalar"):
        plain.publish(root, name, plain.scaled(2, SHAPES[name]))
    for version in (1, 2):
        plain.publish(root, "versioned", plain.scaled(version + 1), version)
    for name in ("both", "table"):
        plain.publish(root, name, plain.model(GRAPHS[name]))
    bundles.publish_classifier(root)
    bundles.publish_forecaster(root)
    with serving(root, max_request_rows=MAX_ROWS, max_request_bytes=2000, model_versions="all") as served:
        yield served


@pytest.mark.parametrize("dtype", [dtype for dtype in plain.DTYPES if dtype != "string"])
def test_every_number_comes_back(client: Any, dtype: str) -> None:
    values = extremes(dtype)
    for given in (values, values.tolist(), np.asfortranarray(values)):
        found = client.infer(dtype, {"x": given})["y"]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, values)
        found[0, 0] = 1  # an array of the caller's own


def test_text_comes_back(client: Any) -> None:
    words = [["", "a\0", "Ráfaga ☃"], ["x" * 1000, "\0", "b"]]
    for given in (words, np.array(words, dtype=object), [[word.encode() for word in row] for row in words]):
        assert client.infer("string", {"x": given})["y"].tolist() == words


def test_shapes_are_those_of_the_graph(client: Any) -> None:
    assert client.infer("flat", {"x": [1, 2, 3]})["y"].tolist() == [2, 4, 6]
    assert client.infer("fixed", {"x": np.ones((2, 3))})["y"].tolist() == [[2] * 3] * 2
    assert client.infer("scalar", {"x": 4})["y"] == 8


def test_versions(client: Any) -> None:
    x = np.ones((1, 3), np.float32)
    found = [client.infer("versioned", {"x": x}, version=version)["y"][0, 0] for version in (None, 0, 1, 2)]
    assert found == [3, 3, 2, 3]
    with pytest.raises(ModelNotFound):
        client.infer("versioned", {"x": x}, version=7)


@pytest.mark.parametrize("rows", [2, MAX_ROWS + 1, 100])
def test_more_rows_than_a_request_or_a_batch_may_have(client: Any, rows: int) -> None:
    a, b = np.random.default_rng(rows).normal(size=(2, rows, 3)).astype(np.float32)
    found = client.infer("both", {"a": a, "b": b})
    assert list(found) == ["sum", "difference"]
    assert list(client.infer("both", {"b": b, "a": a}, outputs=["difference"])) == ["difference"]
    np.testing.assert_array_equal(found["sum"], a + b)
    np.testing.assert_array_equal(found["difference"], a - b)
    assert client.infer("flat", {"x": np.arange(rows)})["y"].tolist() == [2 * i for i in range(rows)]
    words = [[f"{i}", "", "x"] for i in range(rows)]
    assert client.infer("string", {"x": words})["y"].tolist() == words


def test_the_row_that_the_model_rejects_is_named(client: Any) -> None:
    index = np.arange(100) % 4
    index[17] = 200
    with pytest.raises(RejectedByModel, match="idx=200") as raised:
        client.infer("table", {"index": index})
    assert raised.value.__notes__ == ["input 17"]


def test_bundles_take_tensors_too(client: Any) -> None:
    """1. An image model takes pixels (here more bytes than a request may have), or files as bytes. 2. A forecaster's
    lengths are optional."""
    pixels = messages.random_digits(1, rows=3)
    expected = bundles.classify(pixels)
    for image in (pixels, [messages.png(row[:, :, 0]) for row in pixels]):
        np.testing.assert_allclose(client.infer("digits", {"image": image})["probabilities"], expected, atol=1e-5)
    history = messages.random_history(4, 12)
    found = client.infer("series", {"history": [history]})
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
def test_what_does_not_fit_is_refused(client: Any, model: str, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidTensor, match=message):
        client.infer(model, inputs)
    with pytest.raises(InvalidRequest, match="no output 'z'; available: "):
        client.infer("float32", {"x": np.zeros((1, 3))}, outputs=["z"])
