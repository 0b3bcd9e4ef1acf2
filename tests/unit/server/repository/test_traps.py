"""Values that end the process in ONNX Runtime's kernels, and the graphs that are changed so that they do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from rafaga.server.repository.onnx_file import parse
from rafaga.server.repository.traps import fails_on_empty, guarded, kinds_to_guard
from tests import plain

RUN = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
session.run(None, {name: numpy.load(file) for name, file in (given.split("=") for given in sys.argv[2:])})
"""


def division(operator: str, dtype: str) -> onnx.ModelProto:
    kind = plain.typed(dtype)
    return plain.model(f"({kind} a, {kind} b) => ({kind} c) {{ c = {operator}(a, b) }}")


def ends_the_process(tmp_path: Path, model: bytes, **arrays: np.ndarray) -> bool:
    (tmp_path / "model.onnx").write_bytes(model)
    for name, array in arrays.items():
        np.save(tmp_path / name, array)
    inputs = [f"{name}={tmp_path / name}.npy" for name in arrays]
    done = subprocess.run(
        [sys.executable, "-c", RUN, tmp_path / "model.onnx", *inputs], capture_output=True, check=False
    )
    assert done.returncode <= 0, done.stderr
    return done.returncode < 0


def guard(content: bytes) -> bytes:
    return guarded(content, kinds_to_guard(parse(content), content))


def run(model: bytes, **arrays: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, arrays)[0]


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("operator", ["Div", "Mod"])
def test_the_smallest_integer_divided_by_minus_one(tmp_path: Path, operator: str, dtype: str) -> None:
    """1. ONNX Runtime ends the process. 2. The changed graph divides as before, and wraps around."""
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    a = np.array([least, least, 7, -7, 5, most, least, -9, 0], dtype)
    b = np.array([-1, 1, -1, -1, 3, -1, least, -2, -1], dtype)
    model = division(operator, dtype).SerializeToString()
    few = {"a": a[:3], "b": np.full(3, -1, dtype)}  # more int32 are divided by other instructions
    assert ends_the_process(tmp_path, model, **few), "if this fails, the guard is not needed any more"
    safe = guard(model)
    assert not ends_the_process(tmp_path, safe, **few)
    wrapped = [value - 2 * (most + 1) if value > most else value for value in _exact(operator, a, b)]
    assert run(safe, a=a, b=b).tolist() == wrapped


def _exact(operator: str, a: np.ndarray, b: np.ndarray) -> list[int]:
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    if operator == "Mod":
        return [x % y for x, y in pairs]
    return [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in pairs]


@pytest.mark.parametrize(
    "model",
    [
        division("Div", "float32"),
        division("Div", "int8"),
        division("Mod", "uint64"),
        division("Mod<fmod = 1>", "int64"),
        plain.model("(int64[n] a) => (int64[n] c) { c = Div(a, b) }", b=np.array(2)),
        plain.model("(int64[2] a) => (int64[2] c) { b = Constant<value = int64[2] {3, -2}>() c = Mod(a, b) }"),
    ],
)
def test_other_divisions_stay_as_they_are(model: onnx.ModelProto) -> None:
    content = model.SerializeToString()
    assert guard(content) is content


@pytest.mark.parametrize("divisor", [np.array(-1), np.array([2, -1]), np.array(-1, np.int32)])
def test_a_constant_of_minus_one_is_guarded(tmp_path: Path, divisor: np.ndarray) -> None:
    dtype = divisor.dtype.name
    model = plain.model(f"({dtype}[2] a) => ({dtype}[2] c) {{ c = Div(a, b) }}", b=divisor)
    least = np.iinfo(dtype).min
    got = run(guard(model.SerializeToString()), a=np.full(2, least, dtype))
    assert got.tolist() == [least if d == -1 else least // d for d in np.broadcast_to(divisor, 2)]


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32"])
@pytest.mark.parametrize("place", ["branch", "function"])
def test_divisions_inside_branches_and_functions(place: str, dtype: str) -> None:
    kind = plain.typed(dtype)
    signature = f"({kind} a, {kind} b) => ({kind} c)"
    if place == "branch":
        branch = f"branch () => ({kind} c) {{ c = Div(a, b) }}"
        choice = f"c = If<then_branch = {branch}, else_branch = {branch}>(yes)"
        model = plain.model(f"{signature} <bool yes = {{1}}> {{ {choice} }}")
    else:
        model = plain.model(f"{signature} {{ c = own.Halve(a, b) }}")
        node, opset = helper.make_node("Div", ["a", "b"], ["c"]), helper.make_opsetid("", 18)
        model.functions.append(helper.make_function("own", "Halve", ["a", "b"], ["c"], [node], [opset]))
        model.opset_import.append(helper.make_opsetid("own", 1))
    content = model.SerializeToString()
    safe = guard(content)
    if dtype == "float32":
        assert safe == content
        return
    least = np.iinfo(dtype).min
    assert run(safe, a=np.array([least, 8], dtype), b=np.array([-1, 4], dtype)).tolist() == [least, 2]


def test_a_result_that_is_an_output_already_and_one_that_is_not() -> None:
    for outputs in (("c", "d"), ("d",)):
        given = ", ".join(f"int64[n] {name}" for name in outputs)
        model = plain.model(f"(int64[n] a, int64[n] b) => ({given}) {{ c = Div(a, b) d = Div(c, b) }}")
        session = ort.InferenceSession(guard(model.SerializeToString()), providers=["CPUExecutionProvider"])
        least = np.iinfo(np.int64).min
        got = session.run(None, {"a": np.array([least]), "b": np.array([-1])})
        assert [array.tolist() for array in got] == [[least]] * len(outputs)


def test_operators_that_do_not_take_empty_inputs() -> None:
    weights = {"w": np.zeros((1, 12, 2), np.float32), "r": np.zeros((1, 12, 4), np.float32)}
    gru = plain.model("(float[t,1,2] x) => (float[t,1,1,4] y) { y = GRU<hidden_size = 4>(x, w, r) }", **weights)
    assert fails_on_empty(parse(gru.SerializeToString()))
    assert not fails_on_empty(parse(plain.scaled(2).SerializeToString()))
