"""Plain ONNX files, without a bundle, as users bring them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str | None]

DTYPES = {
    "bool": TensorProto.BOOL,
    "uint8": TensorProto.UINT8,
    "uint16": TensorProto.UINT16,
    "uint32": TensorProto.UINT32,
    "uint64": TensorProto.UINT64,
    "int8": TensorProto.INT8,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "string": TensorProto.STRING,
}


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[str, Shape]],
    outputs: Mapping[str, tuple[str, Shape]],
    **constants: np.ndarray,
) -> onnx.ModelProto:
    """`inputs` and `outputs`: dtype and shape by name."""

    def values(tensors: Mapping[str, tuple[str, Shape]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(n, DTYPES[dtype], list(shape)) for n, (dtype, shape) in tensors.items()]

    held = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    made = helper.make_graph(nodes, "plain", values(inputs), values(outputs), held)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def identity(dtype: str, shape: Shape) -> onnx.ModelProto:
    node = helper.make_node("Identity", ["x"], ["y"])
    return graph([node], {"x": (dtype, shape)}, {"y": (dtype, shape)})


def scaled(factor: float, shape: Shape = ("batch", 3)) -> onnx.ModelProto:
    """y = factor * x, float32."""
    node = helper.make_node("Mul", ["x", "factor"], ["y"])
    return graph([node], {"x": ("float32", shape)}, {"y": ("float32", shape)}, factor=np.array(factor, np.float32))


def spinning() -> onnx.ModelProto:
    """y = x, int64, after as many turns of a loop as the largest x: some 1.2 million turns a second."""

    def value(name: str, kind: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, [])

    turn = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["goes_on"]), helper.make_node("Identity", ["held"], ["kept"])],
        "turn",
        [value("turn", TensorProto.INT64), value("going", TensorProto.BOOL), value("held", TensorProto.INT64)],
        [value("goes_on", TensorProto.BOOL), value("kept", TensorProto.INT64)],
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["turns"], keepdims=0),
        helper.make_node("Loop", ["turns", "going_on", "nothing"], ["still_nothing"], body=turn),
        helper.make_node("Add", ["x", "still_nothing"], ["y"]),
    ]
    shape = ("batch",)
    return graph(
        nodes, {"x": ("int64", shape)}, {"y": ("int64", shape)}, going_on=np.array(True), nothing=np.array(0, np.int64)
    )


def publish(repository: Path, name: str, model: onnx.ModelProto, version: int = 1) -> Path:
    """Gives the file."""
    file = repository / name / str(version) / "model.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, file)
    return file
