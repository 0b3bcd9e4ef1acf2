"""ONNX graphs from their text syntax, and files of them without a bundle, as users bring them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

DTYPES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "string"),
)


def model(graph: str, **constants: np.ndarray) -> onnx.ModelProto:
    """`(float[n,3] x) => (float[n,3] y) { y = Relu(x) }`, and constants that are too large for the text."""
    made = parser.parse_model(f'<ir_version: 10, opset_import: ["": 18]> plain {graph}')
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items())
    return made


def typed(dtype: str, shape: Sequence[int | str | None] = ("n",)) -> str:
    """The type of a tensor, in the text syntax; None: a dimension without a name."""
    sizes = ",".join("?" if size is None else str(size) for size in shape)
    name = {"float32": "float", "float64": "double"}.get(dtype, dtype)
    return f"{name}[{sizes}]" if shape else name


def identity(dtype: str, shape: Sequence[int | str | None]) -> onnx.ModelProto:
    return model(f"({typed(dtype, shape)} x) => ({typed(dtype, shape)} y) {{ y = Identity(x) }}")


def scaled(factor: float, shape: Sequence[int | str | None] = ("batch", 3)) -> onnx.ModelProto:
    """y = factor * x, float32."""
    x = typed("float32", shape)
    return model(f"({x} x) => ({x} y) {{ y = Mul(x, factor) }}", factor=np.array(factor, np.float32))


def lstm(lengths: bool = False) -> onnx.ModelProto:
    """x float32 [time, n, 2] -> y, the last states [1, n, 4]; of shorter series too, with their lengths, int32 [n]."""
    rng = np.random.default_rng(0)
    shapes = {"w": (1, 16, 2), "r": (1, 16, 4), "b": (1, 32)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    more, length = (", int32[n] length", "length") if lengths else ("", "")
    return model(
        f"(float[t,n,2] x{more}) => (float[1,n,4] y) {{ all, y = LSTM<hidden_size = 4>(x, w, r, b, {length}) }}",
        **weights,
    )


def spinning() -> onnx.ModelProto:
    """y = x, int64, after as many turns of a loop as the largest x: some 1.2 million turns a second."""
    return model(
        """(int64[batch] x) => (int64[batch] y) <bool go = {1}, int64 nothing = {0}> {
            turns = ReduceMax<keepdims = 0>(x)
            still_nothing = Loop<body = turn (int64 number, bool going, int64 held) => (bool goes_on, int64 kept) {
                goes_on = Identity(going)
                kept = Identity(held)
            }>(turns, go, nothing)
            y = Add(x, still_nothing)
        }"""
    )


def endless() -> onnx.ModelProto:
    """Never returns."""
    made = spinning()
    (largest,) = (node for node in made.graph.node if node.op_type == "ReduceMax")
    made.graph.node.remove(largest)
    made.graph.initializer.append(numpy_helper.from_array(np.array(2**62), "turns"))
    return made


def crashing() -> onnx.ModelProto:
    """Ends the process with SIGFPE if an input is 0, as the first one that is tried."""
    signature = "(float[b,n,1] signal, int64 length) => (float[b,f,k,2] spectrum)"
    return model(f"{signature} {{ spectrum = STFT(signal, step, , length) }}", step=np.array(4))


def publish(repository: Path, name: str, model: onnx.ModelProto, version: int = 1) -> Path:
    """Gives the file."""
    file = repository / name / str(version) / "model.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, file)
    return file
