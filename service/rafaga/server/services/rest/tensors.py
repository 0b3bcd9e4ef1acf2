"""Tensors of the Open Inference Protocol in JSON: nested lists or flat ones, and their bytes in a gRPC request."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from rafaga.errors import InvalidTensor, listed, quoted
from rafaga.tensors import DATATYPES, length_prefixed, on_wire, to_wire, with_lengths

_OPENING = re.compile(rb"[\s\[]*")
_KINDS: dict[str, type] = {"b": bool, "u": int, "i": int, "f": float, "O": str}  # by numpy's kind of dtype
# Decoders of nested lists are kept. numpy has no arrays of more dimensions.
_MAX_DEPTH = 64


def raw_contents(datatype: str, shape: Sequence[int], data: memoryview) -> bytes:
    """The bytes of a tensor whose elements are in `data` as JSON. Raises InvalidTensor."""
    dtype = DATATYPES.get(datatype)
    if dtype is None:
        raise InvalidTensor(f"expected a datatype of {listed(DATATYPES)}; got {quoted(datatype, 30)}")
    opening = _OPENING.match(data)
    depth = opening[0].count(b"[") if opening else 0
    if depth > _MAX_DEPTH or depth not in (1, len(shape)):
        raise InvalidTensor("expected data as a flat list, or nested as the shape is")
    try:
        elements = _decoder(_KINDS[dtype.kind], depth).decode(data)
        with np.errstate(over="raise"):
            array = np.array(elements, dtype)
    except msgspec.MsgspecError as error:
        raise InvalidTensor(f"data: {error}") from None
    except (OverflowError, FloatingPointError):
        raise InvalidTensor(f"a value does not fit {datatype}") from None
    except ValueError:
        raise InvalidTensor("expected lists of the same length in each dimension") from None
    if (depth > 1 and array.shape != tuple(shape)) or array.size != math.prod(shape):
        got = list(array.shape) if depth > 1 else f"{array.size} elements"
        raise InvalidTensor(f"expected data of shape {list(shape)}, got {got}")
    if dtype.kind == "O":
        return with_lengths(text.encode() for text in array.ravel())
    return to_wire(array)


def values(datatype: str, raw: bytes) -> list[Any]:
    """The elements of a tensor as JSON has them, flat."""
    if datatype == "BYTES":
        return [element.decode(errors="replace") for element in length_prefixed(raw)]
    elements: list[Any] = np.frombuffer(raw, on_wire(DATATYPES[datatype])).tolist()
    return elements


@lru_cache(maxsize=256)
def _decoder(kind: type, depth: int) -> msgspec.json.Decoder[Any]:
    nested: Any = kind
    for _ in range(depth):
        nested = list[nested]
    return msgspec.json.Decoder(nested)
