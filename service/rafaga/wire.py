"""Protobuf's wire format, for messages that are written or read field by field, without building them.

Format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_MOST_BITS = 63  # in all bytes of a varint but the last


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field. Concatenated fields are a message."""
    return head_of(number, len(payload)) + payload


def head_of(number: int, length: int) -> bytes:
    """What precedes the `length` bytes of a length-delimited field."""
    head = bytearray()
    for value in (number << 3 | _LENGTH_DELIMITED, length):
        while value > 127:
            head.append(value & 127 | 128)
            value >>= 7
        head.append(value)
    return bytes(head)


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field; fixed-width values are given as 0.

    Raises IndexError or ValueError when the message is broken.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, value
        elif wire == _LENGTH_DELIMITED:
            length, at = _varint(message, at)
            if length > len(message) - at:
                raise ValueError("a field is longer than its message")
            at += length
            yield number, message[at - length : at]
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
            yield number, 0
        else:
            raise ValueError(f"unsupported wire type {wire}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    value = shift = 0
    while (byte := message[at]) & 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if shift > _MOST_BITS:
            raise ValueError("a number is longer than 10 bytes")
    return value | byte << shift, at + 1
