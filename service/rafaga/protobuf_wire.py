"""Protobuf's wire format, for messages that are read or written without building them.

A message is its fields one after the other: a key (number << 3 | wire type), then the value.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a serialised message. Values of fixed size are skipped and given as 0.

    Raises IndexError or ValueError if the message is broken.
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
            raise ValueError(f"unknown wire type {wire}")


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field."""
    return field_head(number, len(payload)) + payload


def field_head(number: int, length: int) -> bytes:
    """Key and length of a length-delimited field, to be followed by `length` bytes."""
    head = bytearray([number << 3 | _BYTES])
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    head.append(length)
    return bytes(head)


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := message[at]) & 128:
        value |= (byte & 127) << shift
        shift += 7
        at += 1
    return value | byte << shift, at + 1
