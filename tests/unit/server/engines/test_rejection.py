"""Errors made from ONNX Runtime's messages."""

from __future__ import annotations

import numpy as np
import pytest

from rafaga.errors import RejectedByModel, RequestTooLarge
from rafaga.server.engines.onnxruntime import create_session
from rafaga.server.engines.rejection import rejection
from tests import plain


def failure(operator: str, **inputs: np.ndarray) -> Exception:
    """What ONNX Runtime raises."""
    given = ", ".join(f"{plain.typed(a.dtype.name, [None] * a.ndim)} {name}" for name, a in inputs.items())
    model = plain.model(f"({given}) => (int64 y) {{ y = {operator}({', '.join(inputs)}) }}")
    model.graph.node[0].name = "/secret/path/node"
    model.graph.output[0].ClearField("type")  # ONNX Runtime infers it
    session = create_session(model.SerializeToString(), 1)
    with pytest.raises(Exception, match="running") as raised:
        session.run(None, inputs)
    return raised.value


FLOATS = np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            lambda: failure("Gather", x=FLOATS, i=np.array([7])),
            "Gather: indices element out of data bounds, idx=7 must be within the inclusive range [-3,2]",
        ),
        (lambda: failure("MatMul", x=FLOATS, w=np.zeros((3, 5), np.float32)), "MatMul: MatMul dimension mismatch"),
        (
            lambda: failure("Add", x=FLOATS, w=np.zeros((4, 5), np.float32)),
            "Add: Attempting to broadcast an axis by a dimension other than 1. 2 by 5",
        ),
        (
            lambda: failure("STFT", x=np.zeros((1, 10, 1), np.float32), s=np.array(4), w=np.zeros(20, np.float32)),
            "STFT: Ensure that the dft size is smaller than the signal.",
        ),
        (lambda: failure("Div", a=np.array([1]), b=np.array([0])), "Div: Integer division by zero"),
        (lambda: RuntimeError("cannot read /srv/models/a.onnx at 0x7f00deadbeef"), "cannot read … at …"),
        (lambda: RuntimeError("/a/b.cc:3 void f(int) x < y was false. "), "no reason is known"),
        (lambda: RuntimeError("x" * 1000), "x" * 299 + "…"),
    ],
)
def test_the_reason_is_given_without_paths(error: object, reason: str) -> None:
    rejected = rejection(error())  # type: ignore[operator]
    assert isinstance(rejected, RejectedByModel)
    assert rejected.message == f"the model fails on this input: {reason}"


def test_an_input_for_which_memory_lacks_is_too_large() -> None:
    error = failure("Expand", x=np.zeros((1, 1), np.float32), shape=np.array([1 << 20, 1 << 22]))
    assert isinstance(rejection(error), RequestTooLarge)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA failure 700: an illegal memory access was encountered"),
        ValueError("expected 2 rows in every output, got [4]"),
        ZeroDivisionError(),
    ],
)
def test_failures_of_the_device_and_the_server_are_not_rejections(error: Exception) -> None:
    assert rejection(error) is None
