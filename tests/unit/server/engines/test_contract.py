"""What every engine on the CPU does, in ONNX Runtime and in OpenVINO."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, EngineName, Precision, TensorSpec
from rafaga.plain_model import PlainModel
from rafaga.server.engines import openvino
from rafaga.server.engines.contract import Engine, run, run_in_batches
from rafaga.server.engines.loading import ModelToPlace, Samples
from rafaga.server.engines.rejection import rejection
from rafaga.server.engines.selection import opened
from rafaga.server.repository.golden import Golden
from tests import plain
from tests.bundles import EVERY_TASK

needs_openvino = pytest.mark.skipif(not openvino.installed(), reason="openvino is not installed")
both = pytest.mark.parametrize(
    "name", [EngineName.ONNXRUNTIME, pytest.param(EngineName.OPENVINO, marks=needs_openvino)]
)


def engine_of(name: EngineName, spec: Bundle | PlainModel, content: bytes, pipelined: bool = False) -> Engine:
    model = ModelToPlace(spec, content, Precision.FP32, Samples(()), 8, None, name)
    return opened(model, threads=1, spinning=False)(pipelined=pipelined)


def plain_engine(name: EngineName, model: onnx.ModelProto, most: int = 8) -> Engine:
    """x, y: the input and output of `model`; their shapes are of no interest to the engine."""
    x, y = (TensorSpec(name=each, dtype="float32", shape=(None,)) for each in "xy")
    return engine_of(name, PlainModel("model", 1, (x,), (y,), most), model.SerializeToString())


@both
@pytest.mark.parametrize("publish", EVERY_TASK)
@pytest.mark.parametrize("pipelined", [False, True])
def test_every_kind_of_model(
    tmp_path: Path, name: EngineName, publish: Callable[[Path], Path], pipelined: bool
) -> None:
    """Answers do not depend on the batch, outlive the next run, and leave the inputs as they were."""
    folder = publish(tmp_path)
    bundle = bundles.load(folder)
    golden = Golden.load(bundle, folder / bundles.GOLDEN)
    engine = engine_of(name, bundle, (folder / "model.onnx").read_bytes(), pipelined)
    golden.verify(engine, 1e-4, max_rows=8)
    given = golden.tiled(7)
    before = tuple(a.copy() for a in given)
    together = run(engine, given)
    kept = tuple(a.copy() for a in together)
    for most in (1, 3):
        for split, whole in zip(run_in_batches(engine, given, most), together, strict=True):
            np.testing.assert_allclose(np.float32(split), np.float32(whole), rtol=1e-5, atol=1e-6)
    for now, then in zip((*together, *given), (*kept, *before), strict=True):
        np.testing.assert_array_equal(now, then)
    assert engine.close()


@both
def test_a_model_without_batches_gets_its_whole_input(name: EngineName) -> None:
    total = plain.model("(float[n,2] x) => (float[2] y) { y = ReduceSum<keepdims=0>(x, axis) }", axis=np.array([0]))
    engine = plain_engine(name, total, most=0)
    assert run(engine, (np.ones((1, 4, 2), np.float32),))[0].tolist() == [[4.0, 4.0]]


@both
def test_outputs_with_rows_missing(name: EngineName) -> None:
    bounds = {"start": np.array([1]), "end": np.array([99])}
    engine = plain_engine(name, plain.model("(float[n,2] x) => (float[m,2] y) { y = Slice(x, start, end) }", **bounds))
    with pytest.raises(ValueError, match="expected 3 rows in every output"):
        run(engine, (np.zeros((3, 2), np.float32),))


@both
def test_a_run_that_fails_is_an_error_and_not_the_answer_of_the_run_before(name: EngineName) -> None:
    graph = "(float[n] x) => (float[n,7] y) { y = Reshape(x, shape) }"
    engine = plain_engine(name, plain.model(graph, shape=np.array([-1, 7])), most=0)
    assert run(engine, (np.ones((1, 7), np.float32),))[0].shape == (1, 1, 7)
    with pytest.raises(Exception, match="shape") as raised:
        run(engine, (np.ones((1, 10), np.float32),))
    rejected = rejection(raised.value)
    assert rejected is not None
    reason = {
        EngineName.ONNXRUNTIME: "The input tensor cannot be reshaped to the requested shape. "
        "Input shape:{10}, requested shape:{-1,7}",
        EngineName.OPENVINO: "[cpu]reshape: the shape of input data (10) conflicts with the reshape pattern (-1.7)",
    }[name]
    assert rejected.message == f"the model fails on this input: Reshape: {reason}"
    assert run(engine, (np.ones((1, 14), np.float32),))[0].shape == (1, 2, 7)


def products(count: int) -> onnx.ModelProto:
    """As many products of a batch with a matrix of ones over 512: y = x where the columns of x are equal."""
    steps = "\n".join(f"p{n + 1} = MatMul(p{n}, w)" for n in range(count))
    graph = f"(float[n,512] x) => (float[n,512] y) {{ p0 = Identity(x)\n {steps}\n y = Identity(p{count}) }}"
    return plain.model(graph, w=np.full((512, 512), 1 / 512, np.float32))


@both
def test_a_long_run_is_terminated_and_a_closed_engine_runs_nothing(name: EngineName) -> None:
    engine = plain_engine(name, products(300), most=10**6)
    rows = np.ones((512, 512), np.float32)
    run(engine, (rows[:1],))
    ended: list[Exception] = []

    def compute() -> None:
        while not ended:
            try:
                run(engine, (rows,))
            except Exception as error:
                ended.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    engine.terminate()
    thread.join(60)
    assert len(ended) == 1
    with pytest.raises(Exception, match="terminate"):
        run(engine, (rows[:1],))
    assert engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        run(engine, (rows[:1],))
