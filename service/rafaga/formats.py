"""Formats of encoded images: which are decoded, and what a file declares before anything of it is decoded."""

from __future__ import annotations

import io
from collections.abc import Callable

from rafaga.errors import InvalidImage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
ACCEPTED = "JPEG, PNG, WebP, GIF or BMP"
MAX_SIDE = 16_384
"""Of an image as it was sent. Pillow keeps a pointer and a rounded-up line per row, whatever its width."""
MAX_SCANS = 100
"""Of a JPEG file. Encoders write about ten; every scan visits all pixels, and an empty one is 75 bytes."""
MAX_HEADER_READS = 10_000
"""Until the first pixel. Pillow parses headers in Python; comments of a GIF file come in pieces of one byte."""

_START_OF_SCAN = b"\xff\xda"  # within a scan, 0xff is followed by zero
# Known and not decoded: their decoders allocate by sizes within the file, or run what is in it.
_REFUSED = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"%PDF": "PDF",
    b"8BPS": "Photoshop",
    b"<svg": "SVG",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xffO\xffQ": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
}
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC"}


class Stopped(Exception):
    """The decoding of an image was stopped, because its caller has gone."""


class ImageFile(io.BytesIO):
    """Pillow reads a file piece by piece, between which a decode can be stopped. `header`: it is parsed just now."""

    header = True

    def __init__(self, data: bytes, stopped: Callable[[], bool]) -> None:
        super().__init__(data)
        self._stopped = stopped
        self._reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        if self._stopped():
            raise Stopped
        self._reads += 1
        if self.header and self._reads > MAX_HEADER_READS:
            raise InvalidImage("the image's header has too many parts: remove its comments, or convert it to PNG")
        return super().read(size)


def check_format(data: bytes, max_pixels: int) -> None:
    """Before Pillow opens the file. Raises InvalidImage for a format that is not decoded, or a canvas that is too
    large: the decoder of WebP allocates it as it opens the file."""
    name = next((name for magic, name in _REFUSED.items() if data.startswith(magic)), None)
    if name is None and data[4:8] == b"ftyp":
        name = _BRANDS.get(data[8:12])
    if name is not None:
        raise InvalidImage(f"expected a {ACCEPTED} file, got {name}: convert it first")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        check_size(*_webp_size(data), max_pixels)


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises InvalidImage."""
    if width * height > max_pixels:
        raise too_large(width * height, max_pixels)
    if max(width, height) > MAX_SIDE:
        raise InvalidImage(f"expected at most {MAX_SIDE} pixels a side, got {height}x{width}")


def too_large(pixels: int, max_pixels: int) -> InvalidImage:
    return InvalidImage(f"expected at most {max_pixels} pixels, got {pixels}: send a smaller image")


def check_coding(data: bytes, kind: str | None, codec: str) -> None:
    """Of an opened file, by its format and Pillow's name of the decoder. Raises InvalidImage."""
    if kind in ("JPEG", "MPO") and (scans := data.count(_START_OF_SCAN)) > MAX_SCANS:
        raise InvalidImage(f"expected at most {MAX_SCANS} scans in a JPEG file, got {scans}")
    if kind == "BMP" and codec != "raw":  # decoded pixel by pixel in Python
        raise InvalidImage("a compressed BMP file: save it without compression, or as PNG")


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the canvas (RFC 9649). Raises InvalidImage."""
    kind, head = data[12:16], data[20:30]
    if len(head) == 10 and kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if len(head) == 10 and kind == b"VP8 " and head[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    if len(head) >= 5 and kind == b"VP8L" and head[0] == 0x2F:
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise InvalidImage(f"expected a whole {ACCEPTED} file, got {len(data)} bytes of a damaged WebP file")
