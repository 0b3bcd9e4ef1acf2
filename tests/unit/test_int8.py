"""The same answers of int8 files on every processor, and which processors are quick with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.verify import open_session
from rafaga import int8
from rafaga.server.engines.onnxruntime import create_session

_TERMS = 64


def convolution() -> onnx.ModelProto:
    """y = sum(x * w) / 10,000 for _TERMS weights of 127, quantised as export does: two products of the largest numbers
    add up to twice what 16 bits hold."""
    constants = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "weights": np.full((1, _TERMS, 1, 1), 127, np.int8),
        "weights_zero": np.int8(0),
        "unit": np.float32(10_000),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "one", "zero"], ["x_float"]),
        helper.make_node("DequantizeLinear", ["weights", "one", "weights_zero"], ["weights_float"]),
        helper.make_node("Conv", ["x_float", "weights_float"], ["sum"]),
        helper.make_node("QuantizeLinear", ["sum", "unit", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "convolution",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [None, _TERMS, 1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [None, 1, 1, 1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_no_sum_is_cut_off(tmp_path: Path) -> None:
    """In the server and in what export measures with."""
    onnx.save(convolution(), tmp_path / "model.onnx")
    largest = np.full((3, _TERMS, 1, 1), 255, np.uint8)
    exact = round(_TERMS * 255 * 127 / 10_000)
    for session in (create_session((tmp_path / "model.onnx").read_bytes(), 1), open_session(tmp_path / "model.onnx")):
        assert session.run(None, {"x": largest})[0].ravel().tolist() == [exact] * 3


@pytest.mark.parametrize(
    ("text", "quick"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx_vnni\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f\nprocessor\t: 1\nflags\t\t: fpu avx2 avx512f\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        ("machine that tells nothing\n", True),
    ],
)
def test_what_the_processor_says(tmp_path: Path, text: str, quick: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert int8.quick(tmp_path / "cpuinfo") == quick


def test_where_nobody_can_tell(tmp_path: Path) -> None:
    assert int8.quick(tmp_path / "missing")
