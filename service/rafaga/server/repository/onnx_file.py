"""Refuses ONNX models whose tensors are stored in other files ("external data"), before ONNX Runtime reads them.

ONNX Runtime resolves such files against the working directory if it gets the model as bytes. Their contents are not
covered by the model's hash, and a model could read files that it should not.
"""

from __future__ import annotations

from rafaga.errors import BundleError
from rafaga.wire import fields

# Where tensors occur in a ModelProto: for each message, the field numbers and the messages in them.
_TENSOR, _EXTERNAL_DATA, _DATA_LOCATION = "tensor", 13, 14
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: _TENSOR, 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: _TENSOR, 6: "graph", 10: _TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: _TENSOR, 2: _TENSOR},
    _TENSOR: {},
}


def refuse_external_data(model: bytes) -> None:
    """Raises BundleError if `model`, a serialised ModelProto, is not complete in itself."""
    pending: list[tuple[str, memoryview]] = [("model", memoryview(model))]
    try:
        while pending:
            kind, message = pending.pop()
            for number, value in fields(message):
                if kind == _TENSOR and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value)):
                    raise BundleError("the model takes tensors from other files (external data): save it as one file")
                if isinstance(value, memoryview) and (inside := _INSIDE[kind].get(number)):
                    pending.append((inside, value))
    except (IndexError, ValueError):
        raise BundleError("the file is not an ONNX model") from None
