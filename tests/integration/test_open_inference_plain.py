"""Plain ONNX files without a bundle, over the Open Inference Protocol: all that their graphs may declare."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from rafaga.errors import InvalidRequest, InvalidTensor, RejectedByModel
from rafaga.inference import open_inference_pb2 as pb
from rafaga.v1 import catalog_pb2
from tests import bundles, plain
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Serve, Served, assert_refused, serving

NUMBERS = [dtype for dtype in plain.DTYPES if dtype != "string"]
ROWS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
SHAPES: dict[str, tuple[Any, ...]] = {
    "scaled": ("batch", 3),
    "unnamed-batch": (None, 3),
    "free": ("batch", "time", 2),
    "flat": ("batch",),
    "fixed": (2, 3),
    "scalar": (),
}
GRAPHS = {
    "across": "(float[n,3] x) => (float[n,3] y) { y = Softmax<axis = 0>(x) }",
    "total": "(float[n,3] x) => (float[m,3] y) <int64[1] axes = {0}> { y = ReduceSum<keepdims = 1>(x, axes) }",
    "so-far-int64": "(int64[n] x) => (int64[n] y) <int64 axis = {0}> { y = CumSum(x, axis) }",
    "so-far-bool": """(bool[n] x) => (int64[n] y) <int64 axis = {0}> {
        number = Cast<to = 7>(x)
        y = CumSum(number, axis)
    }""",
    "one-row": """(float[n,3] x) => (float[n,3] y) <int64[1] shape = {3}, int64[2] back = {-1, 3}> {
        flat = Reshape(x, shape)
        y = Reshape(flat, back)
    }""",
    "columns": """(float[n,8] x) => (float[n,m] y) <int64[1] axes = {0}, float half = {0.5}> {
        most = ReduceMax<keepdims = 0>(x, axes)
        kept = Greater(most, half)
        y = Compress<axis = 1>(x, kept)
    }""",
    "product": "(float[n,3] a, float[3,m] b) => (float[n,m] c) { c = MatMul(a, b) }",
    "both": """(float[batch,3] a, float[batch,3] b) => (float[batch,3] sum, float[batch,3] difference) {
        sum = Add(a, b)
        difference = Sub(a, b)
    }""",
    "table": """(int64[batch] index) => (float[batch,3] row)
    <float[4,3] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}> { row = Gather<axis = 0>(table, index) }""",
    "chosen": "(float[n] x, bool[m] mask) => (float[k] y) { y = Compress(x, mask) }",
    "edges": """(float[n,3] nodes, int64[m,2] edges) => (float[3] total, float[m,2,3] ends) <int64[2] axes = {0, 1}> {
        ends = Gather(nodes, edges)
        total = ReduceSum<keepdims = 0>(ends, axes)
    }""",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("plain")
    for dtype in plain.DTYPES:
        plain.publish(root, f"identity-{dtype}", plain.identity(dtype, ("batch", 3)))
    for name, shape in SHAPES.items():
        plain.publish(root, name, plain.scaled(2, shape))
    for name, graph in GRAPHS.items():
        plain.publish(root, name, plain.model(graph))
    plain.publish(root, "words", plain.identity("string", ("batch", "words")))
    with serving(root) as served:
        yield served


def infer(served: Served, model: str, **arrays: Any) -> dict[str, np.ndarray]:
    return oip.answer(served, oip.request(model, **arrays))


def described(served: Served, model: str) -> tuple[Any, Any]:
    """Metadata and configuration. The sizes of the configuration have no batch."""
    stub = oip.stub(served)
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name=model))
    config = stub.ModelConfig(pb.ModelConfigRequest(name=model)).config
    assert config.HasField("dynamic_batching") == (config.max_batch_size > 0)
    first = int(config.max_batch_size > 0)
    for sized, told in ((config.input, metadata.inputs), (config.output, metadata.outputs)):
        assert [list(t.dims) for t in sized] == [list(t.shape)[first:] for t in told]
    return metadata, config


def text(shape: tuple[int, ...], *elements: bytes, model: str = "identity-string") -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, raw_input_contents=[oip.length_prefixed(*elements)])
    request.inputs.add(name="x", datatype="BYTES", shape=shape)
    return request


def extremes(dtype: str) -> np.ndarray:
    """[2, 3], with the extreme values of the dtype."""
    if dtype == "bool":
        return np.array([[True, False, True], [False, False, True]])
    info = np.finfo(dtype) if np.dtype(dtype).kind == "f" else np.iinfo(dtype)
    return np.array([[info.min, 0, info.max], [1, 2, 3]], dtype)


@pytest.mark.parametrize("typed", [False, True], ids=["raw", "typed"])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_every_datatype_round_trips(served: Served, dtype: str, typed: bool) -> None:
    model, values = f"identity-{dtype}", extremes(dtype)
    (told,) = described(served, model)[0].inputs
    assert (told.datatype, list(told.shape)) == (oip.DATATYPES[dtype], [-1, 3])
    if typed and dtype == "float16":
        request = oip.request(model, x=values)
        del request.raw_input_contents[:]
        request.inputs[0].contents.fp32_contents.extend([1] * 6)
        assert_refused(lambda: oip.infer(served, request), InvalidTensor, "FP16 comes as raw_input_contents only")
        return
    response = oip.infer(served, oip.request(model, typed=typed, x=values))
    assert response.outputs[0].datatype == oip.DATATYPES[dtype]
    np.testing.assert_array_equal(oip.arrays(response)["y"], values)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("uint8", 256), ("uint16", 2**16), ("int8", 128), ("int8", -129), ("int16", 2**15)],
)
def test_typed_values_must_fit_their_datatype(served: Served, dtype: str, value: int) -> None:
    request = oip.request(f"identity-{dtype}", typed=True, x=np.zeros((1, 3), dtype))
    getattr(request.inputs[0].contents, oip.CONTENTS[oip.DATATYPES[dtype]])[1] = value
    assert_refused(lambda: oip.infer(served, request), InvalidTensor, "a value does not fit")


@pytest.mark.parametrize("model", ["chosen", "identity-bool"])
def test_a_byte_that_is_not_a_bool_is_refused(served: Served, model: str) -> None:
    """Kernels that count rows by summing such bytes would return uninitialised memory. Every request is checked, also
    one that was sent before."""
    x, mask = np.arange(3, dtype=np.float32), np.array([True, False, True])
    if model == "chosen":
        request, expected = oip.request(model, x=x, mask=mask), x[mask]
    else:
        request, expected = oip.request(model, x=mask[np.newaxis]), mask[np.newaxis]
    for _ in range(2):
        np.testing.assert_array_equal(oip.answer(served, request)["y"], expected)
    request.raw_input_contents[-1] = b"\1\0\xff"
    assert_refused(lambda: oip.infer(served, request), InvalidTensor, "bytes of 0 or 1 for bool, got 255")


def test_strings_are_bytes(served: Served) -> None:
    told, configured = described(served, "identity-string")
    assert (told.inputs[0].datatype, list(told.inputs[0].shape)) == ("BYTES", [-1, 3])
    assert configured.input[0].data_type == pb.TYPE_STRING
    elements = [s.encode() for s in ("", "a", "Ráfaga ☃", "x" * 1000, "\0", "b")]
    raw, typed = text((2, 3), *elements), text((2, 3))
    del typed.raw_input_contents[:]
    typed.inputs[0].contents.bytes_contents.extend(elements)
    for request in (raw, typed):
        assert oip.answer(served, request)["y"].ravel().tolist() == elements
    for bad, says in ((elements[:-1], "6 elements, got 5"), ([b"\xff", *elements[1:]], "UTF-8")):
        assert_refused(lambda bad=bad: oip.infer(served, text((2, 3), *bad)), InvalidTensor, says)
    classes = oip.asking_for(text((1, 3), b"a", b"a", b"a"), "y", classification=1)
    assert_refused(lambda: oip.infer(served, classes), InvalidRequest)


@pytest.mark.parametrize("model", ["scaled", "unnamed-batch"])
def test_a_free_first_dimension_is_the_batch(served: Served, model: str) -> None:
    told, configured = described(served, model)
    assert (oip.shapes(told.inputs), oip.shapes(told.outputs)) == ({"x": [-1, 3]}, {"y": [-1, 3]})
    assert (told.platform, list(told.versions)) == ("onnxruntime_onnx", ["1"])
    assert configured.max_batch_size == 32
    for x in (ROWS, np.tile(ROWS, (20, 1))):  # the second is more than a batch
        np.testing.assert_array_equal(infer(served, model, x=x)["y"], 2 * x)


def test_other_free_dimensions_may_have_any_size(served: Served) -> None:
    assert oip.shapes(described(served, "scalar")[0].inputs) == {"x": []}
    np.testing.assert_array_equal(infer(served, "scalar", x=np.array(3, np.float32))["y"], 6)
    assert oip.shapes(described(served, "free")[0].inputs) == {"x": [-1, -1, 2]}
    for time in (1, 2, 50):
        x = np.random.default_rng(time).normal(size=(3, time, 2)).astype(np.float32)
        np.testing.assert_array_equal(infer(served, "free", x=x)["y"], 2 * x)
    says = "input x: expected a tensor of shape [N, any, 2], got [1, 5, 3]"
    assert_refused(lambda: infer(served, "free", x=np.zeros((1, 5, 3), np.float32)), InvalidTensor, says)


@pytest.mark.parametrize("typed", [False, True], ids=["raw", "typed"])
def test_free_dimensions_other_than_the_batch_may_be_zero(served: Served, typed: bool) -> None:
    """As a graph without edges has them, and series without steps. Each is sent twice: the second may be cached."""
    for count in (0, 2, 0):
        edges = np.zeros((count, 2), np.int64)
        found = infer(served, "edges", typed=typed, nodes=ROWS, edges=edges)
        np.testing.assert_allclose(found["total"], ROWS[edges].sum(axis=(0, 1)), rtol=1e-5)
        assert found["ends"].shape == (count, 2, 3)
    for _ in range(2):
        assert infer(served, "free", typed=typed, x=np.zeros((3, 0, 2), np.float32))["y"].shape == (3, 0, 2)
    words = text((2, 0), model="words")
    if typed:
        del words.raw_input_contents[:]
    assert oip.answer(served, words)["y"].shape == (2, 0)


@pytest.mark.parametrize(
    ("shape", "raw", "says"),
    [
        ((0, 4, 2), b"", "at least one row, got shape [0, 4, 2]"),
        ((1, 4, 0), b"", "shape [N, any, 2], got [1, 4, 0]"),
        ((2**40, 0, 2), b"", "sizes of at most"),
        ((1, 0, 2), b"1234", "expected no contents"),
    ],
)
def test_empty_tensors_that_are_refused(served: Served, shape: tuple[int, ...], raw: bytes, says: str) -> None:
    request = pb.ModelInferRequest(model_name="free", raw_input_contents=[raw])
    request.inputs.add(name="x", datatype="FP32", shape=shape)
    assert_refused(lambda: oip.infer(served, request), InvalidTensor, says)


def test_one_number_per_row_has_a_column_unless_the_client_sends_none(served: Served) -> None:
    """Triton's clients expect a size per row. Others send, and get, what the graph has. The second call is cached."""
    assert oip.shapes(described(served, "flat")[0].inputs) == {"x": [-1, 1]}
    for shape in ((3,), (3, 1), (3,), (3, 1)):
        x = np.arange(3, dtype=np.float32).reshape(shape)
        np.testing.assert_array_equal(infer(served, "flat", x=x)["y"], 2 * x, strict=True)


def test_a_fixed_first_dimension_takes_no_batches(served: Served) -> None:
    told, configured = described(served, "fixed")
    assert configured.parameters["trained"].string_value == "false"
    assert configured.parameters["weights"].string_value == "unverified: plain ONNX, no bundle"
    assert (oip.shapes(told.inputs), configured.max_batch_size) == ({"x": [2, 3]}, 0)
    stub = oip.stub(served)
    futures = [stub.ModelInfer.future(oip.request("fixed", x=ROWS[i : i + 2])) for i in (0, 1, 2) * 5]
    for i, future in zip((0, 1, 2) * 5, futures, strict=True):
        np.testing.assert_array_equal(oip.arrays(future.result(PATIENCE_S))["y"], 2 * ROWS[i : i + 2])
    (found,) = stub.ModelStatistics(pb.ModelStatisticsRequest(name="fixed")).model_stats
    assert (found.inference_count, found.execution_count, found.inference_stats.success.count) == (15, 15, 15)
    for rows in (1, 3):
        says = f"input x: expected a tensor of shape [2, 3], got [{rows}, 3]"
        assert_refused(lambda rows=rows: infer(served, "fixed", x=ROWS[:rows]), InvalidTensor, says)


EYE = np.eye(3, 8, dtype=np.float32)
EXP = np.exp(ROWS - ROWS.max(0))


@pytest.mark.parametrize(
    ("model", "inputs", "answer"),
    [
        ("across", {"x": ROWS}, EXP / EXP.sum(0)),
        ("total", {"x": ROWS}, ROWS.sum(0, keepdims=True)),
        ("so-far-int64", {"x": np.array([1, 0, 1, 1])}, [1, 1, 2, 3]),  # zeros would give the same alone
        ("so-far-bool", {"x": np.array([True, False, True, True])}, [1, 1, 2, 3]),
        ("columns", {"x": EYE}, np.eye(3)),  # a batch has other columns than its rows alone
        ("one-row", {"x": ROWS[:1]}, ROWS[:1]),  # a batch size written into the graph
        ("product", {"a": ROWS, "b": ROWS.T}, ROWS @ ROWS.T),  # no common first dimension
    ],
)
def test_rows_that_depend_on_each_other_are_not_batched(
    served: Served, model: str, inputs: dict[str, np.ndarray], answer: Any
) -> None:
    """Their graphs look batchable; trial runs at load show that they are not."""
    told, configured = described(served, model)
    assert configured.max_batch_size == 0
    assert all(-1 in shape for shape in oip.shapes(told.inputs).values())
    (found,) = infer(served, model, **inputs).values()
    np.testing.assert_allclose(found, answer, atol=1e-5)
    if model == "one-row":
        assert_refused(lambda: infer(served, model, x=ROWS[:2]), RejectedByModel)


def test_outputs_come_as_asked(served: Served) -> None:
    """1. All outputs, in the graph's order. 2. The requested ones, in the request's order."""
    expected = {"sum": 3 * ROWS, "difference": ROWS}
    for asked in ([], ["difference"], ["sum"], ["difference", "sum"]):
        found = oip.answer(served, oip.asking_for(oip.request("both", b=ROWS, a=2 * ROWS), *asked))
        assert list(found) == (asked or list(expected))
        for name, values in found.items():
            np.testing.assert_allclose(values, expected[name], atol=1e-6)


def test_classes_without_labels_are_numbers(served: Served) -> None:
    found = oip.answer(served, oip.asking_for(oip.request("scaled", x=ROWS), "y", classification=2))["y"]
    best = np.argsort(-ROWS, axis=1)[:, :2]
    assert [[int(e.split(b":")[1]) for e in row] for row in found] == best.tolist()
    assert all(e.count(b":") == 1 for e in found.ravel())


def test_plain_models_are_unverified_and_have_no_task(served: Served) -> None:
    model = served.catalog.GetModel(catalog_pb2.GetModelRequest(name="scaled")).model
    assert (model.state, model.task, model.trained, model.precision) == (catalog_pb2.Model.READY, "", False, "")
    assert "unverified" in model.weights_source
    assert [(t.name, t.dtype, list(t.shape)) for t in model.inputs] == [("x", "float32", [-1, 3])]
    string = served.catalog.GetModel(catalog_pb2.GetModelRequest(name="identity-string")).model
    assert string.inputs[0].dtype == "string"
    classify = messages.classify(messages.random_digits(0), "scaled")
    assert_refused(lambda: served.vision.Classify(classify), InvalidRequest, "Open Inference Protocol")


def refused_models(root: Path, served: Served) -> dict[str, str]:
    """The models in `root` that are not served, with their state."""
    index = oip.stub(served).RepositoryIndex(pb.RepositoryIndexRequest()).models
    assert {m.name for m in index} == {p.name for p in root.iterdir()}
    return {m.name: m.state for m in index if m.state != "READY"}


def test_a_broken_bundle_is_not_served_as_plain_onnx(
    tmp_path: Path, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Each has a model.onnx that would run."""
    for name in ("empty-manifest", "foreign-manifest", "lost-manifest", "changed-model", "wrong-golden"):
        bundles.publish_classifier(tmp_path, name)
    (tmp_path / "empty-manifest/1/bundle.json").write_text("")
    (tmp_path / "foreign-manifest/1/bundle.json").write_text('{"schema": 1}')
    (tmp_path / "lost-manifest/1/bundle.json").unlink()
    (tmp_path / "changed-model/1/model.onnx").write_bytes((tmp_path / "wrong-golden/1/golden.npz").read_bytes())
    (tmp_path / "wrong-golden/1/golden.npz").write_bytes(b"")
    served = serve(tmp_path)
    assert len(refused_models(tmp_path, served)) == 5
    assert "UNVERIFIED" not in caplog.text


def test_refused_models_are_logged_with_the_reason(
    tmp_path: Path, serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """External data is refused even where ONNX Runtime would find it: in the working directory."""
    root = tmp_path / "repository"
    file = plain.publish(root, "external", plain.scaled(2))
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="data.bin", size_threshold=0)
    shutil.copy(file.with_name("data.bin"), tmp_path)
    monkeypatch.chdir(tmp_path)
    sequence = plain.model("(float[n,3] x) => (seq(float) list) { list = SequenceConstruct(x) }")
    plain.publish(root, "sequence", sequence)
    plain.publish(root, "nonsense", plain.scaled(2)).write_bytes(b"no model at all")
    plain.publish(root, "empty", plain.scaled(2)).write_bytes(b"")
    real = plain.publish(root, "link", plain.scaled(2))
    real.rename(tmp_path / "elsewhere.onnx")
    real.symlink_to(tmp_path / "elsewhere.onnx")
    never = "(float[3] x) => (float[7] y) <int64[1] seven = {7}> { y = Reshape(x, seven) }"
    plain.publish(root, "never", plain.model(never))
    plain.publish(root, "good", plain.scaled(2))
    served = serve(root)
    states = refused_models(root, served)
    assert states == dict.fromkeys(("empty", "external", "link", "never", "nonsense", "sequence"), "UNAVAILABLE")
    np.testing.assert_array_equal(infer(served, "good", x=ROWS)["y"], 2 * ROWS)
    for says in ("external data", "seq(tensor(float)) cannot be served", "not an ONNX model", "outside the repository"):
        assert says in caplog.text
    (record,) = [r for r in caplog.records if "UNVERIFIED" in r.message]
    assert (record.levelname, record.__dict__["model"]) == ("WARNING", "good")


def test_a_model_with_an_operator_that_takes_no_empty_input(tmp_path: Path, serve: Serve) -> None:
    """ONNX Runtime's GRU ends the process on a sequence without steps."""
    gru = plain.model(
        "(float[t,1,2] x) => (float[t,1,1,4] y) { y = GRU<hidden_size = 4>(x, w, r) }",
        w=np.ones((1, 12, 2), np.float32),
        r=np.ones((1, 12, 4), np.float32),
    )
    plain.publish(tmp_path, "gru", gru)
    served = serve(tmp_path)
    assert_refused(lambda: infer(served, "gru", x=np.ones((0, 1, 2), np.float32)), InvalidTensor)
    assert infer(served, "gru", x=np.ones((5, 1, 2), np.float32))["y"].shape == (5, 1, 1, 4)
