"""The same answers of int8 files on every processor, and which processors are quick with them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
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


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What is known of this processor is kept for the process."""
    int8.quick.cache_clear()
    yield
    int8.quick.cache_clear()


class Saturating:
    """A session of a processor without VNNI, not configured."""

    def run(self, names: None, feed: dict[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        products = feed["a"].astype(np.int32)[:, :, None] * feed["b"].astype(np.int32)[None]
        pairs = np.minimum(products[:, 0::2] + products[:, 1::2], 2**15 - 1)
        return [pairs.sum(axis=1, dtype=np.int32)]


def exact(options: ort.SessionOptions) -> bool:
    try:
        return options.get_session_config_entry("session.x64quantprecision") == "1"
    except RuntimeError:  # not set
        return False


def test_sums_do_not_saturate(tmp_path: Path) -> None:
    """In the server, and in what export measures with."""
    onnx.save(convolution(), tmp_path / "model.onnx")
    largest = np.full((3, _TERMS, 1, 1), 255, np.uint8)
    expected = round(_TERMS * 255 * 127 / 10_000)
    for session in (create_session((tmp_path / "model.onnx").read_bytes(), 1), open_session(tmp_path / "model.onnx")):
        assert session.run(None, {"x": largest})[0].ravel().tolist() == [expected] * 3


@pytest.mark.parametrize(("machine", "quick", "set_"), [
    ("x86_64", True, False),
    ("AMD64", False, True),
    ("aarch64", False, False),
])  # fmt: skip
def test_only_x86_without_vnni_pays_for_exact_sums(
    monkeypatch: pytest.MonkeyPatch, machine: str, quick: bool, set_: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(int8, "quick", lambda: quick)
    options = ort.SessionOptions()
    int8.configure(options)
    assert exact(options) == set_


@pytest.mark.parametrize(
    ("text", "quick"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx_vnni\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f\nprocessor\t: 1\nflags\t\t: fpu avx2 avx512f\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
    ],
)
def test_instructions_that_the_system_lists(tmp_path: Path, text: str, quick: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert int8.quick(tmp_path / "cpuinfo") == quick


@pytest.mark.parametrize("text", [None, "a machine that lists no instructions\n"])
@pytest.mark.parametrize(("machine", "saturates", "quick"), [
    ("x86_64", True, False),
    ("x86_64", False, True),
    ("arm64", True, True),
])  # fmt: skip
def test_without_a_list_x86_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, machine: str, saturates: bool, quick: bool
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(int8, "saturates", lambda _: saturates)
    assert int8.quick(tmp_path / "cpuinfo") == quick


def test_the_try_finds_saturation() -> None:
    assert int8.saturates(cast(ort.InferenceSession, Saturating()))
    if int8.quick():
        assert not int8.saturates(ort.InferenceSession(int8._PROBE, providers=["CPUExecutionProvider"]))
