"""OpenVINO's engine: the answers of every kind of model, its errors, and what happens without the package."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from rafaga import bundle as bundles
from rafaga import processor
from rafaga.bundle import Bundle, Precision, TensorSpec
from rafaga.errors import DeviceError
from rafaga.plain_model import PlainModel
from rafaga.server.engines import openvino
from rafaga.server.engines.contract import run
from rafaga.server.engines.onnxruntime import SessionEngine, create_session
from rafaga.server.engines.openvino import OpenVinoEngine, compiled
from rafaga.server.engines.rejection import rejection
from rafaga.server.repository.golden import Golden
from tests import bundles as samples
from tests import plain

needs_openvino = pytest.mark.skipif(not openvino.installed(), reason="openvino is not installed")


def engine_of(model: onnx.ModelProto, most: int = 8) -> OpenVinoEngine:
    """x, y: the input and output of `model`; their shapes are of no interest to the engine."""
    x, y = (TensorSpec(name=name, dtype="float32", shape=(None,)) for name in "xy")
    described = PlainModel("model", 1, (x,), (y,), most)
    return OpenVinoEngine(described, compiled(model.SerializeToString(), 1, Precision.FP32))


@needs_openvino
@pytest.mark.parametrize(
    "publish",
    [
        samples.publish_classifier,
        samples.publish_convolutions,
        samples.publish_backbone,
        samples.publish_detector,
        samples.publish_segmenter,
        samples.publish_forecaster,
        samples.publish_sequence_model,
    ],
)
@pytest.mark.parametrize("pipelined", [False, True])
def test_every_kind_of_model(tmp_path: Path, publish: Callable[[Path], Path], pipelined: bool) -> None:
    """Answers do not depend on the batch, outlive the next run, and leave the inputs as they were."""
    folder = publish(tmp_path)
    bundle = bundles.load(folder)
    golden = Golden.load(bundle, folder / bundles.GOLDEN)
    engine = OpenVinoEngine(bundle, compiled((folder / "model.onnx").read_bytes(), 1, Precision.FP32), pipelined)
    golden.verify(engine, 1e-4, max_rows=8)
    given = golden.tiled(7)
    before = tuple(a.copy() for a in given)
    together = run(engine, given)
    kept = tuple(a.copy() for a in together)
    for row in range(7):
        alone = run(engine, tuple(a[row : row + 1] for a in given))
        for one, many in zip(alone, together, strict=True):
            np.testing.assert_allclose(np.float32(one), np.float32(many[row : row + 1]), rtol=1e-5, atol=1e-6)
    for now, then in zip((*together, *given), (*kept, *before), strict=True):
        np.testing.assert_array_equal(now, then)
    assert engine.close()


@needs_openvino
def test_recurrent_models_answer_as_in_onnx_runtime() -> None:
    model = plain.lstm().SerializeToString()
    x, y = (TensorSpec(name=name, dtype="float32", shape=(None,)) for name in "xy")
    described = PlainModel("lstm", 1, (x,), (y,), 0)
    engine = OpenVinoEngine(described, compiled(model, 1, Precision.FP32))
    for length in (3, 20, 7):
        given = (np.random.default_rng(length).normal(size=(1, length, 3, 2)).astype(np.float32),)
        (expected,) = run(SessionEngine(described, create_session(model, 1)), given)
        np.testing.assert_allclose(np.float32(run(engine, given)[0]), np.float32(expected), atol=1e-5)


@needs_openvino
def test_it_reports_nothing_to_its_vendor() -> None:
    package, _ = openvino.runtime()
    assert type(package.tools.ovc.telemetry).__module__ == "openvino.tools.ovc.telemetry_stub"


@needs_openvino
def test_a_model_without_batches() -> None:
    total = plain.model("(float[n,2] x) => (float[2] y) { y = ReduceSum<keepdims=0>(x, axis) }", axis=np.array([0]))
    engine = engine_of(total, most=0)
    assert run(engine, (np.ones((1, 4, 2), np.float32),))[0].tolist() == [[4.0, 4.0]]


@needs_openvino
def test_a_run_that_fails_is_an_error_and_not_the_answer_of_the_run_before() -> None:
    engine = engine_of(
        plain.model("(float[n] x) => (float[n,7] y) { y = Reshape(x, shape) }", shape=np.array([-1, 7])), most=0
    )
    assert run(engine, (np.ones((1, 7), np.float32),))[0].shape == (1, 1, 7)
    with pytest.raises(RuntimeError) as raised:
        run(engine, (np.ones((1, 10), np.float32),))
    rejected = rejection(raised.value)
    assert rejected is not None
    assert rejected.message == (
        "the model fails on this input: Reshape: [cpu]reshape: the shape of input data (10) conflicts with the reshape "
        "pattern (-1.7)"
    )
    assert run(engine, (np.ones((1, 14), np.float32),))[0].shape == (1, 2, 7)


def products(count: int) -> onnx.ModelProto:
    """As many products of a batch with a matrix of ones over 512: y = x where the columns of x are equal."""
    steps = "\n".join(f"p{n + 1} = MatMul(p{n}, w)" for n in range(count))
    graph = f"(float[n,512] x) => (float[n,512] y) {{ p0 = Identity(x)\n {steps}\n y = Identity(p{count}) }}"
    return plain.model(graph, w=np.full((512, 512), 1 / 512, np.float32))


@needs_openvino
def test_a_long_run_is_terminated() -> None:
    engine = engine_of(products(300), most=10**6)
    rows = np.ones((512, 512), np.float32)
    run(engine, (rows[:1],))
    ended: list[BaseException] = []

    def compute() -> None:
        while not ended:
            try:
                run(engine, (rows,))
            except RuntimeError as error:
                ended.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    engine.terminate()
    thread.join(60)
    assert len(ended) == 1
    with pytest.raises(RuntimeError, match="terminated"):
        run(engine, (rows[:1],))
    assert engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        run(engine, (rows[:1],))


@needs_openvino
@pytest.mark.skipif(not processor.instruction_set(Precision.BF16), reason="this processor has no bf16")
def test_bf16_is_used_only_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = samples.publish_convolutions(tmp_path)
    bundle = bundles.load(folder)
    golden = Golden.load(bundle, folder / bundles.GOLDEN)
    full, half = (answers(bundle, folder, precision, golden) for precision in (Precision.FP32, Precision.BF16))
    exact = golden.outputs[0]
    assert np.abs(full - exact).max() < 1e-5
    assert 1e-5 < np.abs(half - exact).max() < 0.05 * np.abs(exact).max()


def answers(bundle: Bundle, folder: Path, precision: Precision, golden: Golden) -> np.ndarray:
    engine = OpenVinoEngine(bundle, compiled((folder / "model.onnx").read_bytes(), 1, precision))
    return np.asarray(run(engine, golden.inputs)[0])


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What is known of the package is found out anew, before and after."""
    for _ in (None,):
        openvino.runtime.cache_clear()
        openvino.usable.cache_clear()
        yield
    openvino.runtime.cache_clear()
    openvino.usable.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_without_the_package(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert not openvino.installed()
    assert not openvino.usable()
    with pytest.raises(DeviceError, match=r"OpenVINO is not installed: pip install 'rafaga\[openvino\]'"):
        openvino.runtime()


@pytest.mark.usefixtures("forgotten")
def test_a_broken_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "openvino.py").write_text("raise OSError('libopenvino.so: no such file')")
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert openvino.installed()
    assert not openvino.usable()
    assert not openvino.usable()
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == (
        "OpenVINO is installed, but cannot be used: OSError: libopenvino.so: no such file: models stay on ONNX Runtime"
    )
