"""Results as notebooks show them: tables, boxes and label maps. All text is escaped."""

from __future__ import annotations

import base64
import colorsys
import struct
import zlib
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

_MOST_ROWS = 20
_GOLDEN_RATIO = 0.618034  # hues of classes next to each other differ most


def table(
    caption: object, headings: Sequence[str], rows: Sequence[Sequence[object]], classes: Sequence[int] = ()
) -> str:
    """The first rows, floats with five digits; `classes`: one per row, for its colour."""
    shown = [[_cell(cell) for cell in row] for row in rows[:_MOST_ROWS]]
    for row, index in zip(shown, classes, strict=False):
        row[0] = f'<td><span style="background:{_hex(index)}">&emsp;</span> {row[0].removeprefix("<td>")}'
    if len(rows) > len(shown):
        shown.append([f'<td colspan="{len(headings)}">… and {len(rows) - len(shown)} more</td>'])
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in shown)
    return f"<table><caption>{escape(str(caption))}</caption><tr>{head}</tr>{body}</table>"


def boxes(height: int, width: int, found: Iterable[tuple[str, int, Sequence[float]]]) -> str:
    """An outline of the image with the boxes (left, top, width, height) of labels and their classes, in pixels."""
    size = max(height, width) / 30
    drawn = "".join(
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="none" stroke="{_hex(index)}" '
        f'stroke-width="{size / 6:.1f}"/><text x="{x:.1f}" y="{y + size:.1f}" font-size="{size:.1f}" '
        f'fill="{_hex(index)}">{escape(label)}</text>'
        for label, index, (x, y, w, h) in found
    )
    style = "max-width:100%;border:1px solid #888"
    return f'<svg viewBox="0 0 {width} {height}" width="400" style="{style}">{drawn}</svg>'


def label_map(labels: npt.NDArray[np.uint8]) -> str:
    """An image of uint8 [height, width], one colour per class."""
    palette = b"".join(map(_colour, range(256)))
    lines = np.hstack([np.zeros((len(labels), 1), np.uint8), labels]).tobytes()  # each after its filter, 0: none
    header = struct.pack(">IIBBBBB", labels.shape[1], labels.shape[0], 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<img width="400" style="max-width:100%;image-rendering:pixelated" src="{source}">'


def _cell(value: object) -> str:
    if isinstance(value, float | np.floating):
        return f'<td style="text-align:right">{value:.5g}</td>'
    return f"<td>{escape(str(value))}</td>"


def _colour(index: int) -> bytes:
    """RGB."""
    return bytes(round(255 * part) for part in colorsys.hsv_to_rgb(index * _GOLDEN_RATIO % 1, 0.75, 0.85))


def _hex(index: int) -> str:
    return f"#{_colour(index).hex()}"
