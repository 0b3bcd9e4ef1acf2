"""Arrays and their bytes on the wire, with declared sizes checked before anything is allocated."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rafaga.errors import InvalidTensor

DATATYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": "bool",
        "UINT8": "uint8",
        "UINT16": "uint16",
        "UINT32": "uint32",
        "UINT64": "uint64",
        "INT8": "int8",
        "INT16": "int16",
        "INT32": "int32",
        "INT64": "int64",
        "FP16": "float16",
        "FP32": "float32",
        "FP64": "float64",
        "BYTES": "object",
    }.items()
}
"""The Open Inference Protocol's name of each dtype."""

# Byte orders that are already those of the wire: asking numpy for another dtype costs more than the copy it avoids.
_WIRE_ORDERS = "<|=" if sys.byteorder == "little" else "<|"


def from_wire(data: bytes, dtype: np.dtype[np.generic], shape: Sequence[int]) -> NDArray[np.generic]:
    """A read-only view of `data` as little-endian row-major `dtype` [*shape]; nothing is copied.

    Raises InvalidTensor when the bytes are not as many as the shape declares, or a bool is neither 0 nor 1: ONNX
    Runtime's Compress counts 255 rows for such a byte, and answers with uninitialised memory.
    """
    expected = math.prod(shape) * dtype.itemsize
    if expected == 0:
        raise InvalidTensor(f"expected at least one element, got shape {list(shape)}")
    if len(data) != expected:
        raise InvalidTensor(
            f"expected {expected} bytes for {dtype.name} {list(shape)}, got {len(data)}: shape and data disagree"
        )
    if dtype.kind == "b" and (largest := np.frombuffer(data, np.uint8).max()) > 1:
        raise InvalidTensor(f"expected bytes of 0 or 1 for bool, got {largest}")
    return np.frombuffer(data, on_wire(dtype)).reshape(shape)


def to_wire(array: NDArray[np.generic]) -> bytes:
    """Little-endian row-major bytes of `array`."""
    return in_wire_order(array).tobytes()


def in_wire_order(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """An array whose memory is `to_wire(array)`: itself, if that holds already."""
    return np.ascontiguousarray(array, on_wire(array.dtype))


def with_lengths(elements: Iterable[bytes]) -> bytes:
    """BYTES of the Open Inference Protocol: each element after its length in four bytes, little-endian."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def length_prefixed(raw: bytes | memoryview) -> Iterator[bytes]:
    """The elements of `with_lengths`. Raises InvalidTensor."""
    at = 0
    while at < len(raw):
        if len(raw) - at < 4:
            raise InvalidTensor("BYTES: expected four bytes of length before each element")
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        if length > len(raw) - at:
            raise InvalidTensor(f"BYTES: expected an element of {length} bytes, got {len(raw) - at}")
        yield bytes(raw[at : at + length])
        at += length


def on_wire(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """`dtype` in little-endian byte order."""
    return dtype if dtype.byteorder in _WIRE_ORDERS else dtype.newbyteorder("<")


def check_shape(what: str, got: Sequence[int], expected: Sequence[int | None]) -> None:
    """Raises InvalidTensor unless `got` has the sizes of `expected`, where None fits any."""
    fits = len(got) == len(expected)
    for size, wanted in zip(got, expected, strict=False):
        fits = fits and (wanted is None or size == wanted)
    if not fits:
        raise InvalidTensor(f"expected {what} of shape {describe(expected)}, got {describe(got)}")


def describe(shape: Sequence[int | None]) -> str:
    """A readable shape: [N, 28, 28, 1]; a free size reads "any", a free first axis "N"."""
    words = ["any" if size is None else str(size) for size in shape]
    if words and shape[0] is None:
        words[0] = "N"
    return "[" + ", ".join(words) + "]"


def relative_error(found: NDArray[np.generic], reference: NDArray[np.generic]) -> float:
    """max|a - b| / max(1, max|b|), b being the reference; NaN where either holds one. Shapes must be equal.

    For integers, which are classes, it is the share that differs: a class is right or wrong.
    """
    if found.shape != reference.shape:
        raise ValueError(f"shapes differ: {found.shape} and {reference.shape}")
    if reference.dtype.kind in "iu":
        return float(np.mean(found != reference)) if reference.size else 0.0
    a, b = found.astype(np.float64), reference.astype(np.float64)
    return float(np.max(np.abs(a - b), initial=0.0) / max(1.0, np.max(np.abs(b), initial=0.0)))
