"""What is read from an ONNX file without ONNX Runtime: whether it is complete, and the sizes that occur in it.

ONNX Runtime resolves such files against the working directory if it gets the model as bytes. Their contents
are not covered by the model's hash, and a model could read files that it should not. So models whose tensors are stored
in other files ("external data") are refused before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

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

_INTEGERS: dict[int, np.dtype[Any]] = {6: np.dtype("<i4"), 7: np.dtype("<i8")}  # TensorProto.DataType
_SMALL_BYTES = 128
_LARGEST_SIZE = 2**17


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


def constants(model: bytes) -> set[int]:
    """Integers that may be sizes of an input: dimensions of tensors, values of small tensors and of attributes.

    `model`: a serialised ModelProto.
    """
    found: set[int] = set()
    pending: list[tuple[str, memoryview]] = [("model", memoryview(model))]
    while pending:
        kind, message = pending.pop()
        if kind == _TENSOR:
            found |= _sizes_in(message)
            continue
        for number, value in fields(message):
            if isinstance(value, memoryview) and (inside := _INSIDE[kind].get(number)):
                pending.append((inside, value))
            elif kind == "attribute" and number in (3, 8):  # an integer, or one of several
                found.add(value) if isinstance(value, int) else found.update(_varints(value))
    return {size for size in found if 1 < size <= _LARGEST_SIZE}


def _sizes_in(tensor: memoryview) -> set[int]:
    found: set[int] = set()
    dtype = None
    for number, value in fields(tensor):
        if number == 1:  # dims
            found |= {value} if isinstance(value, int) else set(_varints(value))
        elif number == 2 and isinstance(value, int):
            dtype = _INTEGERS.get(value)
        elif number == 9 and dtype is not None and isinstance(value, memoryview) and len(value) <= _SMALL_BYTES:
            found |= set(np.frombuffer(value, dtype).tolist())
        elif number in (5, 7) and isinstance(value, memoryview) and len(value) <= _SMALL_BYTES:
            found |= set(_varints(value))
    return found


def _varints(packed: memoryview) -> Iterator[int]:
    """The numbers of a packed field."""
    value = shift = 0
    for byte in packed:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield value
            value = shift = 0
