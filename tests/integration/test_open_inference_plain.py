"""Plain ONNX files without a bundle, over the Open Inference Protocol: all that their graphs may declare."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from rafaga.inference import open_inference_pb2 as pb
from rafaga.v1 import catalog_pb2
from tests import bundles, plain
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Serve, Served, refusal, serving

NUMBERS = [dtype for dtype in plain.DTYPES if dtype != "string"]
ROWS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


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
def plain_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    for dtype in plain.DTYPES:
        plain.publish(root, f"identity-{dtype}", plain.identity(dtype, ("batch", 3)))
    shapes = {"unnamed-batch": (None, 3), "free": ("batch", "time", 2), "flat": ("batch",), "fixed": (2, 3)}
    for name, shape in ({"scaled": ("batch", 3), "scalar": ()} | shapes).items():
        plain.publish(root, name, plain.scaled(2, shape))
    for name, graph in GRAPHS.items():
        plain.publish(root, name, plain.model(graph))
    plain.publish(root, "words", plain.identity("string", ("batch", "words")))
    return root


@pytest.fixture(scope="module")
def served(plain_repository: Path) -> Iterator[Served]:
    with serving(plain_repository) as served:
        yield served


def infer(served: Served, model: str, **arrays: Any) -> dict[str, np.ndarray]:
    return oip.arrays(oip.stub(served).ModelInfer(oip.request(model, **arrays), timeout=PATIENCE_S))


def metadata(served: Served, model: str) -> Any:
    return oip.stub(served).ModelMetadata(pb.ModelMetadataRequest(name=model))


def config(served: Served, model: str) -> Any:
    return oip.stub(served).ModelConfig(pb.ModelConfigRequest(name=model)).config


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
    (told,) = metadata(served, model).inputs
    assert (told.datatype, list(told.shape)) == (oip.DATATYPES[dtype], [-1, 3])
    if typed and dtype == "float16":
        request = oip.request(model, x=values)
        del request.raw_input_contents[:]
        request.inputs[0].contents.fp32_contents.extend([1] * 6)
        refused = refusal(lambda: oip.stub(served).ModelInfer(request))
        assert "FP16 comes as raw_input_contents only" in refused.message
        return
    response = oip.stub(served).ModelInfer(oip.request(model, typed=typed, x=values))
    assert response.outputs[0].datatype == oip.DATATYPES[dtype]
    np.testing.assert_array_equal(oip.arrays(response)["y"], values)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("uint8", 256), ("uint16", 2**16), ("int8", 128), ("int8", -129), ("int16", 2**15)],
)
def test_typed_values_must_fit_their_datatype(served: Served, dtype: str, value: int) -> None:
    request = oip.request(f"identity-{dtype}", typed=True, x=np.zeros((1, 3), dtype))
    getattr(request.inputs[0].contents, oip.CONTENTS[oip.DATATYPES[dtype]])[1] = value
    refused = refusal(lambda: oip.stub(served).ModelInfer(request))
    assert refused.reason == "INVALID_TENSOR"
    assert "a value does not fit" in refused.message


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
        np.testing.assert_array_equal(oip.arrays(oip.stub(served).ModelInfer(request))["y"], expected)
    request.raw_input_contents[-1] = b"\1\0\xff"
    refused = refusal(lambda: oip.stub(served).ModelInfer(request))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TENSOR")
    assert "bytes of 0 or 1 for bool, got 255" in refused.message


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_strings_are_bytes(served: Served, raw: bool) -> None:
    (told,) = metadata(served, "identity-string").inputs
    assert (told.datatype, list(told.shape)) == ("BYTES", [-1, 3])
    assert config(served, "identity-string").input[0].data_type == pb.TYPE_STRING
    strings = [["", "a", "Ráfaga ☃"], ["x" * 1000, "\0", "b"]]
    elements = [s.encode() for row in strings for s in row]
    request = pb.ModelInferRequest(model_name="identity-string")
    tensor = request.inputs.add(name="x", datatype="BYTES", shape=(2, 3))
    if raw:
        request.raw_input_contents.append(oip.length_prefixed(*elements))
    else:
        tensor.contents.bytes_contents.extend(elements)
    response = oip.stub(served).ModelInfer(request)
    assert oip.arrays(response)["y"].ravel().tolist() == elements

    for bad, says in ((elements[:-1], "6 elements, got 5"), ([b"\xff", *elements[1:]], "UTF-8")):
        request.inputs[0].ClearField("contents")
        del request.raw_input_contents[:]
        request.raw_input_contents.append(oip.length_prefixed(*bad))
        refused = refusal(lambda: oip.stub(served).ModelInfer(request))
        assert refused.reason == "INVALID_TENSOR"
        assert says in refused.message


@pytest.mark.parametrize("model", ["scaled", "unnamed-batch"])
def test_a_free_first_dimension_is_the_batch(served: Served, model: str) -> None:
    told, configured = metadata(served, model), config(served, model)
    assert oip.shapes(told.inputs) == {"x": [-1, 3]}
    assert oip.shapes(told.outputs) == {"y": [-1, 3]}
    assert (told.platform, list(told.versions)) == ("onnxruntime_onnx", ["1"])
    assert configured.max_batch_size == 32
    assert configured.HasField("dynamic_batching")
    assert ([list(t.dims) for t in configured.input], [list(t.dims) for t in configured.output]) == ([[3]], [[3]])
    np.testing.assert_array_equal(infer(served, model, x=ROWS)["y"], 2 * ROWS)
    many = np.tile(ROWS, (20, 1))  # more than a batch
    np.testing.assert_array_equal(infer(served, model, x=many)["y"], 2 * many)


def test_an_error_about_many_names_is_cut(tmp_path: Path, serve: Serve) -> None:
    """Uncut it would exceed gRPC's limit for metadata, and the client would see "Stream removed"."""
    names = [f"input_with_a_rather_long_name_{i:04}" for i in range(500)]
    inputs = ", ".join(f"float[batch,1] {name}" for name in names)
    wide = f"({inputs}) => (float[batch,1] y) {{ y = Sum({', '.join(names)}) }}"
    plain.publish(tmp_path, "wide", plain.model(wide))
    refused = refusal(lambda: infer(serve(tmp_path), "wide", x=ROWS[:, :1]))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TENSOR")
    assert refused.message.startswith("expected the inputs input_with_a_rather_long_name_0000, ")
    assert "… and 4" in refused.message
    assert refused.message.endswith("got x")


def test_other_free_dimensions_may_have_any_size(served: Served) -> None:
    assert oip.shapes(metadata(served, "free").inputs) == {"x": [-1, -1, 2]}
    for time in (1, 2, 50):
        x = np.random.default_rng(time).normal(size=(3, time, 2)).astype(np.float32)
        np.testing.assert_array_equal(infer(served, "free", x=x)["y"], 2 * x)
    refused = refusal(lambda: infer(served, "free", x=np.zeros((1, 5, 3), np.float32)))
    assert "input x: expected a tensor of shape [N, any, 2], got [1, 5, 3]" in refused.message


@pytest.mark.parametrize("typed", [False, True], ids=["raw", "typed"])
def test_free_dimensions_other_than_the_batch_may_be_zero(served: Served, typed: bool) -> None:
    """As a graph without edges has them, and series without steps. Each is sent twice: the second may be cached."""
    for count in (0, 2, 0):
        edges = np.zeros((count, 2), np.int64)
        request = oip.request("edges", typed=typed, nodes=ROWS, edges=edges)
        found = oip.arrays(oip.stub(served).ModelInfer(request, timeout=PATIENCE_S))
        np.testing.assert_allclose(found["total"], ROWS[edges].sum(axis=(0, 1)), rtol=1e-5)
        assert found["ends"].shape == (count, 2, 3)
    empty = np.zeros((3, 0, 2), np.float32)
    for _ in range(2):
        response = oip.stub(served).ModelInfer(oip.request("free", typed=typed, x=empty), timeout=PATIENCE_S)
        assert oip.arrays(response)["y"].shape == (3, 0, 2)
    request = pb.ModelInferRequest(model_name="words", raw_input_contents=[] if typed else [b""])
    request.inputs.add(name="x", datatype="BYTES", shape=(2, 0))
    assert oip.arrays(oip.stub(served).ModelInfer(request, timeout=PATIENCE_S))["y"].shape == (2, 0)


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
    refused = refusal(lambda: oip.stub(served).ModelInfer(request, timeout=PATIENCE_S))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TENSOR")
    assert says in refused.message


def test_one_number_per_row_has_a_column_unless_the_client_sends_none(served: Served) -> None:
    """Triton's clients expect a size per row. Others send, and get, what the graph has. The second call is cached."""
    assert oip.shapes(metadata(served, "flat").inputs) == {"x": [-1, 1]}
    assert list(config(served, "flat").output[0].dims) == [1]
    for shape in ((3,), (3, 1), (3,), (3, 1)):
        x = np.arange(3, dtype=np.float32).reshape(shape)
        np.testing.assert_array_equal(infer(served, "flat", x=x)["y"], 2 * x, strict=True)


def test_a_fixed_first_dimension_takes_no_batches(plain_repository: Path, serve: Serve) -> None:
    served = serve(plain_repository)
    told, configured = metadata(served, "fixed"), config(served, "fixed")
    assert configured.parameters["trained"].string_value == "false"
    assert configured.parameters["weights"].string_value == "unverified: plain ONNX, no bundle"
    assert oip.shapes(told.inputs) == {"x": [2, 3]}
    assert configured.max_batch_size == 0
    assert not configured.HasField("dynamic_batching")
    assert ([list(t.dims) for t in configured.input], [list(t.dims) for t in configured.output]) == ([[2, 3]], [[2, 3]])
    stub = oip.stub(served)
    futures = [stub.ModelInfer.future(oip.request("fixed", x=ROWS[i : i + 2])) for i in (0, 1, 2) * 5]
    for i, future in zip((0, 1, 2) * 5, futures, strict=True):
        np.testing.assert_array_equal(oip.arrays(future.result(PATIENCE_S))["y"], 2 * ROWS[i : i + 2])
    (found,) = stub.ModelStatistics(pb.ModelStatisticsRequest(name="fixed")).model_stats
    assert (found.inference_count, found.execution_count, found.inference_stats.success.count) == (15, 15, 15)
    for rows in (1, 3):
        refused = refusal(lambda rows=rows: infer(served, "fixed", x=ROWS[:rows]))
        assert f"input x: expected a tensor of shape [2, 3], got [{rows}, 3]" in refused.message


def test_a_graph_without_dimensions(served: Served) -> None:
    assert oip.shapes(metadata(served, "scalar").inputs) == {"x": []}
    np.testing.assert_array_equal(infer(served, "scalar", x=np.array(3, np.float32))["y"], 6)


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
    assert config(served, model).max_batch_size == 0
    (found,) = infer(served, model, **inputs).values()
    np.testing.assert_allclose(found, answer, atol=1e-5)


def test_metadata_of_models_without_batches(served: Served) -> None:
    assert oip.shapes(metadata(served, "across").inputs) == {"x": [-1, 3]}
    assert oip.shapes(metadata(served, "product").inputs) == {"a": [-1, 3], "b": [3, -1]}
    assert refusal(lambda: infer(served, "one-row", x=ROWS[:2])).reason == "REJECTED_BY_MODEL"


def test_outputs_come_as_asked(served: Served) -> None:
    """1. All outputs, in the graph's order. 2. The requested ones, in the request's order."""
    request = oip.request("both", b=ROWS, a=2 * ROWS)
    response = oip.stub(served).ModelInfer(request)
    assert [output.name for output in response.outputs] == ["sum", "difference"]
    for names in (["difference"], ["sum"], ["difference", "sum"]):
        response = oip.stub(served).ModelInfer(oip.asking_for(oip.request("both", b=ROWS, a=2 * ROWS), *names))
        assert [output.name for output in response.outputs] == names
        found = oip.arrays(response)
        expected = {"sum": 3 * ROWS, "difference": ROWS}
        for name in names:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


def test_classes_without_labels_are_numbers(served: Served) -> None:
    request = oip.asking_for(oip.request("scaled", x=ROWS), "y", classification=2)
    found = oip.arrays(oip.stub(served).ModelInfer(request))["y"]
    best = np.argsort(-ROWS, axis=1)[:, :2]
    assert [[int(e.split(b":")[1]) for e in row] for row in found] == best.tolist()
    assert all(e.count(b":") == 1 for e in found.ravel())


def test_text_has_no_classes(served: Served) -> None:
    request = pb.ModelInferRequest(model_name="identity-string", raw_input_contents=[oip.length_prefixed(*[b"a"] * 3)])
    request.inputs.add(name="x", datatype="BYTES", shape=(1, 3))
    refused = refusal(lambda: oip.stub(served).ModelInfer(oip.asking_for(request, "y", classification=1)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


def test_the_catalogue_marks_plain_models_as_unverified(served: Served) -> None:
    model = served.catalog.GetModel(catalog_pb2.GetModelRequest(name="scaled")).model
    assert (model.state, model.task, model.trained, model.precision) == (catalog_pb2.Model.READY, "", False, "")
    assert "unverified" in model.weights_source
    assert [(t.name, t.dtype, list(t.shape)) for t in model.inputs] == [("x", "float32", [-1, 3])]
    string = served.catalog.GetModel(catalog_pb2.GetModelRequest(name="identity-string")).model
    assert string.inputs[0].dtype == "string"


def test_task_methods_refuse_plain_models(served: Served) -> None:
    refused = refusal(lambda: served.vision.Classify(messages.classify(messages.random_digits(0), "scaled")))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert "Open Inference Protocol" in refused.message


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


def sequence() -> onnx.ModelProto:
    made = plain.identity("float32", ("batch", 3))
    made.graph.node.append(helper.make_node("SequenceConstruct", ["x"], ["list"]))
    value = helper.make_tensor_sequence_value_info("list", TensorProto.FLOAT, None)
    made.graph.output.append(value)
    return made


def test_refused_models_are_logged_with_the_reason(
    tmp_path: Path, serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """External data is refused even where ONNX Runtime would find it: in the working directory."""
    root = tmp_path / "repository"
    file = plain.publish(root, "external", plain.scaled(2))
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="data.bin", size_threshold=0)
    shutil.copy(file.with_name("data.bin"), tmp_path)
    monkeypatch.chdir(tmp_path)
    plain.publish(root, "sequence", sequence())
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
    refused = refusal(lambda: infer(served, "gru", x=np.ones((0, 1, 2), np.float32)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TENSOR")
    assert infer(served, "gru", x=np.ones((5, 1, 2), np.float32))["y"].shape == (5, 1, 1, 4)
