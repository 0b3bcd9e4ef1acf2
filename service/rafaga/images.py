"""Encoded images to the uint8 arrays that models take. Runs in the decode threads: Pillow releases the GIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rafaga.bundle import ImagePreparation, Interpolation
from rafaga.errors import InvalidImage
from rafaga.formats import ACCEPTED, FORMATS, ImageFile, Stopped, check_coding, check_format, check_size, too_large

# The decoder is asked to go on after so many bytes.
_CHUNK_BYTES = 16 * 1024
# Sixteen bits of grey. Of sixteen bits of colour, Pillow keeps the higher eight.
_DEEP_GREY = ("I;16", "I;16B", "I;16L", "I;16N")
# EXIF orientations that swap rows and columns.
_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)
# Bicubic and nearest are sensitive to the rounding of a crop's place: the whole image is resized, unless it is so many
# times larger than the crop.
_MOST_SPARED = 16
_RESAMPLING = {each: Image.Resampling[each.name] for each in Interpolation}


class Prepared(NamedTuple):
    """`pixels`: uint8 [height, width, channels], as the model takes them. `size`: (height, width) of the image as it
    was sent, upright."""

    pixels: NDArray[np.uint8]
    size: tuple[int, int]


def prepare(
    data: bytes, preparation: ImagePreparation, max_pixels: int, stopped: Callable[[], bool] = lambda: False
) -> Prepared:
    """Decodes a file (of an animation the first frame) and brings it to the model's size.

    The steps are those of torchvision's evaluation transforms on PIL images (Resize with the interpolation of
    `preparation`, CenterCrop). Values differ from theirs by up to 1/255 where a crop is resized by itself, and by a
    little more where a large JPEG file is decoded at a reduced scale. Raises InvalidImage, or Stopped once `stopped`
    says so.
    """
    check_format(data, max_pixels)
    file = ImageFile(data, stopped)
    try:
        with Image.open(file, formats=FORMATS) as image:
            file.header = False
            width, height = image.size
            check_size(width, height, max_pixels)
            check_coding(data, image.format, str(image.tile[0][0]) if image.tile else "")
            image.decodermaxblock = _CHUNK_BYTES
            turned = preparation.exif_orientation and image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
            size = (width, height) if turned else (height, width)
            _shrink_while_decoding(image, preparation)
            image.load()
            upright: Image.Image = ImageOps.exif_transpose(image) if preparation.exif_orientation else image
            if upright.mode in _DEEP_GREY:  # the conversion alone would clip it to white
                upright = upright.point(lambda value: value * (1 / 257) + 0.5)
            colours = upright.convert("L" if preparation.channels == 1 else "RGB")
            pixels = _resized(colours, preparation, max_pixels)
    except (InvalidImage, Stopped):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidImage(f"the image has more than {max_pixels} pixels: send a smaller one") from None
    except Exception:  # The decoder raises many kinds of errors on bytes that are not a valid image.
        raise InvalidImage(f"expected a whole {ACCEPTED} file, got {len(data)} bytes that do not decode") from None
    array = np.asarray(pixels, dtype=np.uint8)
    return Prepared(array[:, :, np.newaxis] if preparation.channels == 1 else array, size)


def _shrink_while_decoding(image: Image.Image, preparation: ImagePreparation) -> None:
    """Lets the JPEG decoder skip detail (a DCT scale of 1/2, 1/4, 1/8) that the resize would only throw away.

    Twice the wanted size is kept, so that the antialiased resize still decides what the pixels look like.
    """
    wanted = preparation.resize_shorter or min(preparation.height or 0, preparation.width or 0)
    shorter = min(image.size)
    # Nearest picks single pixels: it must see those of the file.
    if wanted and shorter > 4 * wanted and preparation.interpolation is not Interpolation.NEAREST:
        scale = 2 * wanted / shorter
        image.draft(image.mode, (round(image.width * scale), round(image.height * scale)))


def _resized(image: Image.Image, preparation: ImagePreparation, max_pixels: int) -> Image.Image:
    height, width, shorter = preparation.height, preparation.width, preparation.resize_shorter
    resample = _RESAMPLING[preparation.interpolation]
    if shorter is None:
        free = height is None or width is None or image.size == (width, height)
        return image if free else image.resize((width or 0, height or 0), resample)
    scaled = _scaled(image.size, shorter, preparation.max_longer)
    left = 0 if width is None else round((scaled[0] - width) / 2)
    top = 0 if height is None else round((scaled[1] - height) / 2)
    part = resample is Image.Resampling.BILINEAR or scaled[0] * scaled[1] > _MOST_SPARED * (height or 1) * (width or 1)
    if height is None or width is None or left < 0 or top < 0 or not part:
        if scaled[0] * scaled[1] > max_pixels:
            raise too_large(scaled[0] * scaled[1], max_pixels)
        whole = image.resize(scaled, resample)
        return whole if height is None or width is None else whole.crop((left, top, left + width, top + height))
    # Only the part that is kept is computed: the whole of an image of 1x3000 pixels would be of 256x768000.
    x, y = image.width / scaled[0], image.height / scaled[1]
    box = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
    return image.resize((width, height), resample, box)


def _scaled(size: tuple[int, int], shorter: int, max_longer: int | None) -> tuple[int, int]:
    """`size` with the shorter side at `shorter`, or with the longer one at `max_longer` where it would be more."""
    small, large = min(size), max(size)
    longer = int(shorter * large / small)
    if max_longer is not None and longer > max_longer:
        shorter, longer = max(1, int(max_longer * shorter / longer)), max_longer
    return (shorter, longer) if size[0] <= size[1] else (longer, shorter)
