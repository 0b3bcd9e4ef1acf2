"""External data is found wherever an ONNX file can have a tensor."""

from __future__ import annotations

import contextlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from rafaga import wire
from rafaga.errors import BundleError
from rafaga.server.engines.onnxruntime import NO_FILES, create_session
from rafaga.server.repository.onnx_file import parse
from tests import plain


def outside(located: bool = True, named: bool = True) -> onnx.TensorProto:
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1])
    if located:
        tensor.data_location = TensorProto.EXTERNAL
    if named:
        tensor.external_data.add(key="location", value="secret.bin")
    return tensor


def sparse(tensor: onnx.TensorProto) -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.array([0], np.int64))
    return helper.make_sparse_tensor(tensor, indices, [1])


def body() -> onnx.GraphProto:
    return helper.make_graph([], "body", [], [], [outside()])


def graph(**parts: Any) -> onnx.ModelProto:
    model = plain.scaled(2)
    model.graph.MergeFrom(onnx.GraphProto(**parts))
    return model


def node(**attributes: Any) -> onnx.ModelProto:
    return graph(node=[helper.make_node("Thing", ["x"], ["z"], domain="custom", **attributes)])


def function(**about: Any) -> onnx.ModelProto:
    model = plain.scaled(2)
    model.functions.append(helper.make_function("custom", "f", ["x"], ["y"], opset_imports=[], **about))
    return model


def training() -> onnx.ModelProto:
    model = plain.scaled(2)
    model.training_info.add().algorithm.CopyFrom(body())
    return model


OUTSIDE = {
    "initializer": graph(initializer=[outside()]),
    "location without a name": graph(initializer=[outside(named=False)]),
    "name without a location": graph(initializer=[outside(located=False)]),
    "sparse initializer": graph(sparse_initializer=[sparse(outside())]),
    "attribute": node(value=outside()),
    "attribute of several": node(values=[numpy_helper.from_array(np.zeros(1)), outside()]),
    "sparse attribute": node(value=sparse(outside())),
    "graph in an attribute": node(then=body()),
    "graph in a graph": node(then=helper.make_graph([helper.make_node("If", [], [], then=body())], "g", [], [])),
    "graphs in an attribute": node(branches=[body(), body()]),
    "function": function(nodes=[helper.make_node("Constant", [], ["y"], value=outside())]),
    "default of a function": function(nodes=[], attribute_protos=[helper.make_attribute("value", outside())]),
    "training": training(),
}


@pytest.mark.parametrize("model", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_a_tensor_outside_is_found(model: onnx.ModelProto) -> None:
    with pytest.raises(BundleError, match="external data"):
        parse(model.SerializeToString())


def test_a_whole_model_passes() -> None:
    model = node(value=numpy_helper.from_array(np.arange(300.0)), then=helper.make_graph([], "g", [], []))
    model.metadata_props.add(key="external_data", value="location")
    parse(model.SerializeToString())
    for dtype in plain.DTYPES:
        parse(plain.identity(dtype, ("batch", 3)).SerializeToString())


@given(st.binary(max_size=60), st.data())
def test_any_bytes_are_accepted_or_refused(content: bytes, data: st.DataObject) -> None:
    """Also a model that was truncated or changed. No other error than BundleError."""
    changed = bytearray(plain.scaled(2).SerializeToString())
    at = data.draw(st.integers(0, len(changed) - 1))
    changed[at] = data.draw(st.integers(0, 255))
    for file in (content, bytes(changed[: data.draw(st.integers(at, len(changed)))])):
        with suppress(BundleError):
            parse(file)


LEAK = "(int64[n] i) => (float[n] y) { y = Gather(t, i) }"


def varint(value: int, longer: int = 0) -> bytes:
    """In `longer` bytes more than it needs."""
    sevens = [value >> shift & 127 for shift in range(0, max(1, value.bit_length()), 7)] + [0] * longer
    return bytes([*(seven | 128 for seven in sevens[:-1]), sevens[-1]])


def leaking(high: int = 0, longer: int = 0, path: str = "secret") -> bytes:
    """A model whose tensor is in the file `path`. `high`: bits above the 32 of a tag, in the tags that say so."""

    def tagged(tag: int, content: bytes) -> bytes:
        return varint(high << 32 | tag, longer) + content

    location = wire.field(1, b"location") + wire.field(2, path.encode())
    outside = tagged(13 << 3 | 2, varint(len(location)) + location) + tagged(14 << 3, varint(1))
    tensor = b"\x08\x80\x10\x10\x01" + wire.field(8, b"t") + outside  # 2048 of float32: smaller ones are inlined
    return plain.model(LEAK).SerializeToString() + wire.field(7, wire.field(5, tensor))


def answers(model: bytes, folder: Path) -> list[float] | None:
    """What ONNX Runtime answers in that working directory by default; None if it refuses the model."""
    with contextlib.chdir(folder):
        try:
            session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        except Exception:  # onnxruntime raises bare exceptions of many kinds
            return None
    found: list[float] = session.run(None, {"i": np.arange(4)})[0].tolist()
    return found


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("working-directory")
    np.arange(7, 7 + 2048, dtype=np.float32).tofile(folder / "secret")
    return folder


@pytest.mark.parametrize(("high", "longer"), [(0, 0), (1, 0), (7, 0), (0, 1), (0, 2), (1, 1)])
def test_a_tag_in_another_encoding_hides_no_tensor_outside(secret: Path, high: int, longer: int) -> None:
    """ONNX Runtime ignores the bits of a tag above 32, where it reads them at all."""
    model = leaking(high, longer)
    read = answers(model, secret)
    assert read == ([7, 8, 9, 10] if (high == 0 or longer == 0) else None), "if this fails, ONNX Runtime has changed"
    with pytest.raises(BundleError, match="external data" if high == 0 else "not an ONNX model"):
        parse(model)


def test_a_session_reads_no_other_file(secret: Path) -> None:
    """Even of a model that was not checked."""
    file = secret / "secret"
    for path in ("secret", str(file), os.path.relpath(file, NO_FILES), f"cwd/{file.name}", f"../cwd/{file.name}"):
        with contextlib.chdir(secret), pytest.raises(Exception, match="External data path"):
            create_session(leaking(path=path), 1)


@given(st.data())
def test_what_the_parser_accepts_reads_no_file(secret: Path, data: st.DataObject) -> None:
    """Changed bytes of a model that reads a file, and of its description of that file."""
    content = bytearray(leaking(data.draw(st.integers(0, 15)), data.draw(st.integers(0, 3))))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(len(content) - 60, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(BundleError):
        parse(bytes(content))
        assert answers(bytes(content), secret) is None


def test_a_file_of_two_formats_is_read_as_onnx() -> None:
    """ONNX Runtime's own format is known by four bytes, which an ONNX file may have in a field of no meaning."""
    marked = wire.field(100, b"xORTM") + plain.scaled(2).SerializeToString()
    assert marked[4:8] == b"ORTM"
    parse(marked)
    session = create_session(marked, 1)
    assert session.run(None, {"x": np.ones((1, 3), np.float32)})[0].tolist() == [[2, 2, 2]]
    with pytest.raises(Exception, match="ORT"):
        onnxruntime.InferenceSession(marked, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("content", [b"\x80" * 3_000_000, b"\x0a" + b"\x80" * 3_000_000, b"\x3a" * 3_000_000])
def test_megabytes_of_one_number_are_refused_at_once(content: bytes) -> None:
    with pytest.raises(BundleError, match="not an ONNX model"):
        parse(content)
