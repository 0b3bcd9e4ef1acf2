"""Messages that are read field by field."""

from __future__ import annotations

import pytest

from rafaga.wire import field, fields


def test_fields_of_every_kind() -> None:
    message = b"\x08\xac\x02" + b"\x11" + bytes(8) + b"\x1d" + bytes(4) + field(4, b"abc")
    assert list(fields(memoryview(message))) == [(1, 300), (2, 0), (3, 0), (4, b"abc")]


@pytest.mark.parametrize("message", [b"\x80" * 3_000_000, b"\x08" + b"\xff" * 10 + b"\x01", b"\x0a\x02a", b"\x0b"])
def test_a_broken_message(message: bytes) -> None:
    """Also one whose number never ends: it is not read to its end."""
    with pytest.raises(ValueError, match=r"longer than|unsupported wire type"):
        list(fields(memoryview(message)))
