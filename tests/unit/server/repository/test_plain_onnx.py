"""How sample inputs are found for a model.onnx without a bundle, and what happens where none is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from rafaga.errors import BundleError, RafagaError, RejectedByModel
from rafaga.server.config.device import Device, DeviceKind
from rafaga.server.config.per_model import PerModel
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace
from rafaga.server.engines.selection import Placement
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository.loader import Loader
from rafaga.server.scheduling.batcher import BatchPolicy
from rafaga.server.scheduling.job import Arrays, Job
from tests import plain

WAIT_S = 60.0
Load = Callable[..., ServedModel]


def loaded(root: Path, model: onnx.ModelProto, shapes: object = None) -> ServedModel:
    file = plain.publish(root, "m", model)
    if shapes is not None:
        text = shapes if isinstance(shapes, str) else json.dumps(shapes)
        file.with_name("samples.json").write_text(text)
    return Loader(BatchPolicy(), 4, PerModel(None), Placement(), Metrics()).load_plain(file.parent, "m", 1)


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Started models, closed at the end."""
    models: list[ServedModel] = []

    def start(model: onnx.ModelProto, shapes: object = None) -> ServedModel:
        models.append(loaded(tmp_path, model, shapes))
        models[-1].start()
        return models[-1]

    yield start
    for model in models:
        model.close()


def answer(model: ServedModel, *inputs: np.ndarray) -> Arrays | RafagaError:
    """For inputs as the graph has them."""
    found: Future[Arrays | RafagaError] = Future()
    arrays = inputs if model.batched else tuple(array[np.newaxis] for array in inputs)
    model.submit(Job(arrays, lambda outputs, _: found.set_result(outputs), found.set_result))
    outputs = found.result(WAIT_S)
    return outputs if model.batched or isinstance(outputs, RafagaError) else tuple(output[0] for output in outputs)


def windows(size: int, in_constant_node: bool) -> onnx.ModelProto:
    """Sums over windows of `size` samples; shorter inputs fail."""
    kernel = numpy_helper.from_array(np.ones((1, 1, size), np.float32), "kernel")
    model = plain.model("(float[n,1,t] x) => (float[n,1,u] y) { y = Conv(x, kernel) }")
    if in_constant_node:
        model.graph.node.insert(0, helper.make_node("Constant", [], ["kernel"], value=kernel))
    else:
        model.graph.initializer.append(kernel)
    return model


def blocks() -> onnx.ModelProto:
    """y = the sum over blocks of 7 x 11 numbers: takes rows of 77, a size that occurs nowhere in the graph."""
    return plain.model(
        """(float[n,t] x) => (float[n] y) <int64[3] shape = {-1, 7, 11}, int64[2] axes = {1, 2}> {
            blocks = Reshape(x, shape)
            y = ReduceSum<keepdims = 0>(blocks, axes)
        }"""
    )


@pytest.mark.parametrize("in_constant_node", [False, True])
def test_sizes_from_the_graph_are_tried(load: Load, in_constant_node: bool) -> None:
    model = load(windows(5000, in_constant_node))
    assert model.max_batch_size == 4
    (y,) = answer(model, np.ones((2, 1, 5001), np.float32))
    assert y.tolist() == [[[5000, 5000]]] * 2


def test_lengths_next_to_the_data_may_have_to_be_as_large(load: Load) -> None:
    """The first 200 of the length that each row gives are taken: a length of 1 would fail."""
    model = plain.model(
        """(float[1,1,t] x, int64[1] length) => (float[1,1,u] y) <int64[1] none = {0}, int64[1] two = {2}> {
            kept = Slice(x, none, length, two)
            y = Conv(kept, kernel)
        }""",
        kernel=np.ones((1, 1, 200), np.float32),
    )
    (y,) = answer(load(model), np.ones((1, 1, 300), np.float32), np.array([200]))
    assert y.tolist() == [[[200]]]


def test_a_model_without_a_valid_sample_is_served_as_it_comes(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    """It has run nothing before the first request. What it rejects is the caller's, and it goes on."""
    model = load(blocks())
    assert not model.batched
    assert model.sized_by is None, "large inputs are not taken for long runs"
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert "samples.json" in warning
    assert isinstance(answer(model, np.ones((1, 76), np.float32)), RejectedByModel)
    for n in (1, 50):
        (y,) = answer(model, np.ones((n, 77), np.float32))
        assert y.tolist() == [77] * n
    assert not model.down


def test_named_shapes_are_used(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    model = load(blocks(), {"x": [1, 77]})
    assert model.max_batch_size == 4, "warm, and its rows are independent"
    assert model.reference_size == 77
    (y,) = answer(model, np.ones((3, 77), np.float32))
    assert y.tolist() == [77] * 3
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("model", "shapes", "says"),
    [
        (blocks(), {"y": [1, 77]}, "samples.json: no input 'y', expected x"),
        (blocks(), {"x": [77]}, r"x: expected a shape such as \[None, None\], got \[77\]"),
        (blocks(), {"x": [1, 0]}, "x: expected a shape such as"),
        (blocks(), {"x": [1, 76]}, "the graph fails on inputs of the shapes in samples.json"),
        (blocks(), {"x": 77}, "expected shapes such as"),
        (blocks(), "{", "expected shapes such as"),
        (plain.scaled(2), {"x": [1, 4]}, r"expected a shape such as \[None, 3\], got \[1, 4\]"),
    ],
)
def test_shapes_that_do_not_fit(tmp_path: Path, model: onnx.ModelProto, shapes: object, says: str) -> None:
    with pytest.raises(BundleError, match=says):
        loaded(tmp_path, model, shapes)


def test_no_gpu_takes_a_model_without_a_valid_sample(tmp_path: Path) -> None:
    def load(_: Placement, device: Device, model: ModelToPlace) -> LoadedEngine:
        assert device.gpu
        return Placement().load(device, model)

    placement = Placement((Device(DeviceKind.CUDA, 0),))
    loader = Loader(BatchPolicy(), 4, PerModel(None), placement, Metrics(), engine_factory=load)
    with pytest.raises(BundleError, match="fails on every input that was tried"):
        loader.load_plain(plain.publish(tmp_path, "m", blocks()).parent, "m", 1)


def test_a_division_that_would_end_the_process(load: Load) -> None:
    """This test's own process goes on."""
    model = load(plain.model("(int64[n,1] a, int64[n,1] b) => (int64[n,1] c) { c = Mod(a, b) }"))
    (c,) = answer(model, np.array([[np.iinfo(np.int64).min]]), np.array([[-1]]))
    assert c.tolist() == [[0]]
    assert isinstance(answer(model, np.array([[1]]), np.array([[0]])), RejectedByModel)
