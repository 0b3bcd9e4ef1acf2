"""Is everything of a model in its file? Asked before ONNX Runtime reads it.

A graph may name other files to take tensors from ("external data"), and ONNX Runtime looks for them in the working
directory when the model comes as bytes. Such a model is not what was hashed, and may read what it should not.
"""

from __future__ import annotations

from collections.abc import Iterator

from rafaga.errors import BundleError

# Where tensors can hang in a ModelProto: by message, the number of a field and the message in it.
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
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def refuse_external_data(model: bytes) -> None:
    """Raises BundleError when a tensor of `model`, a serialised ModelProto, lies outside of it."""
    pending: list[tuple[str, memoryview]] = [("model", memoryview(model))]
    try:
        while pending:
            kind, message = pending.pop()
            for number, value in _fields(message):
                if kind == _TENSOR and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value)):
                    raise BundleError("the model takes tensors from other files (external data): save it as one file")
                if isinstance(value, memoryview) and (inside := _INSIDE[kind].get(number)):
                    pending.append((inside, value))
    except (IndexError, ValueError):
        raise BundleError("the model is no ONNX file") from None


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a serialised protobuf message: number, and value (fixed ones as 0: nobody asks for them).

    Raises IndexError or ValueError when the message is broken.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, value
        elif wire == _BYTES:
            length, at = _varint(message, at)
            if length > len(message) - at:
                raise ValueError("a field is longer than its message")
            yield number, message[at : at + length]
            at += length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
            yield number, 0
        else:
            raise ValueError("no wire type of ONNX files")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := message[at]) & 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
    return value | byte << shift, at + 1
