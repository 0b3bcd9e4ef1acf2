"""Answers drawn on their image: `--draw` of `rafaga detect` and `rafaga segment`. Needs Pillow."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from rafaga import Detections, Segmentation

Colour = tuple[int, int, int]

# Labels by which datasets name what is not an object; they stay uncoloured.
_BACKGROUND = frozenset({"background", "__background__"})
_OPACITY = 0.55


def drawn(image: bytes, answer: Detections | Segmentation) -> Image.Image:
    """RGB, of the image's own size, upright as the server saw it. `image`: the encoded file."""
    with Image.open(io.BytesIO(image)) as opened:
        canvas = ImageOps.exif_transpose(opened).convert("RGB")
    return _boxes(canvas, answer) if isinstance(answer, Detections) else _classes(canvas, answer)


def _boxes(canvas: Image.Image, answer: Detections) -> Image.Image:
    """The best object last, on top."""
    pen = ImageDraw.Draw(canvas)
    size = _text_size(canvas)
    for found in reversed(answer.objects):
        box, colour = found.box, _colour(found.index)
        corner = min(box.x_max, canvas.width - 1), min(box.y_max, canvas.height - 1)
        pen.rectangle((box.x_min, box.y_min, *corner), outline=colour, width=max(2, size // 5))
        _label(pen, (box.x_min, box.y_min - size * 1.3), f"{found.label} {found.score:.2f}", colour, size)
    return canvas


def _classes(canvas: Image.Image, answer: Segmentation) -> Image.Image:
    """The classes as a coloured layer, and their names at the left, the largest first."""
    shown = [found for found in answer.classes if found.label not in _BACKGROUND]
    palette = np.zeros((256, 3), np.uint8)
    palette[[found.index for found in shown]] = [_colour(found.index) for found in shown] or np.zeros((0, 3))
    labels = answer.full_size()
    pixels = np.asarray(canvas)
    covered = np.isin(labels, [found.index for found in shown])[:, :, np.newaxis]
    mixed = np.where(covered, (1 - _OPACITY) * pixels + _OPACITY * palette[labels], pixels)
    canvas = Image.fromarray(mixed.astype(np.uint8))
    pen, size = ImageDraw.Draw(canvas), _text_size(canvas)
    for row, found in enumerate(shown):
        _label(pen, (size * 0.4, size * (0.4 + 1.5 * row)), found.label, _colour(found.index), size)
    return canvas


def _label(pen: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, colour: Colour, size: int) -> None:
    """On a plate of its class's colour; inside the image even if its box is at the edge."""
    font = ImageFont.load_default(size)
    width, height = pen.textlength(text, font) + size * 0.5, size * 1.3
    whole: Sequence[int] = pen.im.size
    x = min(max(corner[0], 0.0), max(whole[0] - width, 0.0))
    y = min(max(corner[1], 0.0), max(whole[1] - height, 0.0))
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    pen.text((x + size * 0.25, y), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)


def _text_size(canvas: Image.Image) -> int:
    return max(10, round(max(canvas.size) / 40))


def _colour(index: int) -> Colour:
    """Hues a golden ratio apart: neighbouring classes differ clearly, and a class has one colour in every image."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)
