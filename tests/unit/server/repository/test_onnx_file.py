"""External data is found wherever an ONNX file can have a tensor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from rafaga.errors import BundleError
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


def changed(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = plain.scaled(2)
    change(model)
    return model


def with_node(**attributes: Any) -> onnx.ModelProto:
    node = helper.make_node("Thing", ["x"], ["z"], domain="custom", **attributes)
    return changed(lambda model: model.graph.node.append(node))


def with_function(default: bool) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["y"], value=outside())
    attributes = [helper.make_attribute("value", outside())] if default else []
    function = helper.make_function(
        "custom", "f", ["x"], ["y"], [] if default else [node], [], attribute_protos=attributes
    )
    return changed(lambda model: model.functions.append(function))


OUTSIDE = {
    "initializer": changed(lambda model: model.graph.initializer.append(outside())),
    "location without a name": changed(lambda model: model.graph.initializer.append(outside(named=False))),
    "name without a location": changed(lambda model: model.graph.initializer.append(outside(located=False))),
    "sparse initializer": changed(lambda model: model.graph.sparse_initializer.append(sparse(outside()))),
    "attribute": with_node(value=outside()),
    "attribute of several": with_node(values=[numpy_helper.from_array(np.zeros(1)), outside()]),
    "sparse attribute": with_node(value=sparse(outside())),
    "graph in an attribute": with_node(then=body()),
    "graph in a graph": with_node(then=helper.make_graph([helper.make_node("If", [], [], then=body())], "g", [], [])),
    "graphs in an attribute": with_node(branches=[body(), body()]),
    "function": with_function(default=False),
    "default of a function": with_function(default=True),
    "training": changed(lambda model: model.training_info.add().algorithm.CopyFrom(body())),
}


@pytest.mark.parametrize("model", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_a_tensor_outside_is_found(model: onnx.ModelProto) -> None:
    with pytest.raises(BundleError, match="external data"):
        parse(model.SerializeToString())


def test_a_whole_model_passes() -> None:
    model = with_node(value=numpy_helper.from_array(np.arange(300.0)), then=helper.make_graph([], "g", [], []))
    model.metadata_props.add(key="external_data", value="location")
    parse(model.SerializeToString())
    for dtype in plain.DTYPES:
        parse(plain.identity(dtype, ("batch", 3)).SerializeToString())


@given(st.data())
def test_broken_files_are_refused(data: st.DataObject) -> None:
    """Truncated or changed bytes: the file passes or is refused with a BundleError, never another error."""
    content = bytearray(plain.scaled(2).SerializeToString())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    with suppress(BundleError):
        parse(bytes(content[: data.draw(st.integers(at, len(content)))]))


@given(st.binary(max_size=60))
def test_any_bytes_are_accepted_or_refused(content: bytes) -> None:
    with suppress(BundleError):
        parse(content)
