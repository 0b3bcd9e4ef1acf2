"""Images of every accepted kind, brought to the two forms of the wire and checked before any call.

Files, bytes and PIL images are *images*: they travel encoded, and the server resizes and crops them the way the model
was trained. Arrays are *pixels*: they are used as they are, so their size must be one that the model accepts.
"""

from __future__ import annotations

import io
import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from rafaga.client._frames import column
from rafaga.errors import InvalidImage, InvalidRequest, InvalidTensor

_LAYOUTS = "uint8 [height, width] or [height, width, channels]"

# Modes that PNG stores, or that convert to RGB without a loss. Others (32-bit, float) would be clipped: only the caller
# knows how to scale them.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
_RGB_MODES = frozenset({"CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa", "PA", "La"})


class PilImage(Protocol):
    """The part of PIL.Image.Image that is used here; PIL itself is never imported."""

    @property
    def mode(self) -> str: ...
    def convert(self, mode: str) -> PilImage: ...
    def save(self, fp: Any, /, *args: Any, **options: Any) -> None: ...


ImageInput: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | PilImage | npt.NDArray[np.uint8]
"""A path, an encoded image (JPEG, PNG, WebP, GIF, BMP), a PIL image, or pixels as a uint8 array."""

Images: TypeAlias = Iterable[ImageInput] | npt.NDArray[np.uint8]
"""Images of any accepted kinds, or uint8 [batch, height, width, channels]."""

Content: TypeAlias = bytes | npt.NDArray[np.uint8]
"""One image for the wire: an image file's bytes, or pixels [height, width, channels]."""


class Prepared(NamedTuple):
    """One input, ready for a message. Only inputs of one `group` share a message; `size` in bytes."""

    content: Any
    group: Hashable
    size: int


def content(image: ImageInput) -> Content:
    """Reads the file or encodes the PIL image (lossless); bytes and arrays are checked.

    Raises OSError for a file that cannot be read, InvalidImage for an empty one, InvalidTensor for another type or for
    an array that is not one image.
    """
    if isinstance(image, np.ndarray):
        return _pixels(image)
    if isinstance(image, str | os.PathLike):
        data = Path(image).read_bytes()
        if not data:
            raise InvalidImage(f"{os.fspath(image)} is empty; expected an image file")
        return data
    if isinstance(image, bytes | bytearray | memoryview):
        if not len(image):
            raise InvalidImage("the image has no bytes; expected an image file's content")
        return bytes(image)
    if _is_pil(image):
        return _png(image)
    raise InvalidTensor(
        f"an image of type {type(image).__qualname__}; expected a path, bytes, a PIL image or a numpy array {_LAYOUTS}"
    )


def several(images: Images) -> Iterable[ImageInput]:
    """The images one by one, also those of a frame's one column.

    Raises InvalidTensor for an array of another shape or several columns, InvalidRequest for a single image.
    """
    images = column(images)
    if isinstance(images, np.ndarray) and images.ndim != 4:
        raise InvalidTensor(
            f"expected a batch, uint8 [batch, height, width, channels], got {_described(images)}; "
            "grey images need a last axis: images[..., numpy.newaxis]"
        )
    if isinstance(images, str | bytes | os.PathLike) or not isinstance(images, Iterable):
        raise InvalidRequest("expected several images, got one: put it in a list")
    return images


def prepared(image: ImageInput) -> Prepared:
    """Encoded images of any size share a message, arrays only those of their shape."""
    data = content(image)
    return Prepared(data, None, len(data)) if isinstance(data, bytes) else Prepared(data, data.shape, data.nbytes)


def put(request: Any, contents: Sequence[Content]) -> None:
    """Fills the input of a request of rafaga.v1.Vision. The contents are all encoded, or all arrays of one shape."""
    first = contents[0]
    if isinstance(first, bytes):
        request.encoded.images.extend(contents)
        return
    height, width, channels = first.shape
    request.pixels.data = b"".join(np.ascontiguousarray(pixels).data for pixels in contents)
    request.pixels.batch = len(contents)
    request.pixels.height, request.pixels.width, request.pixels.channels = height, width, channels


def _pixels(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, channels] of either layout."""
    if array.dtype != np.uint8:
        hint = (
            "; values in 0..1 become pixels by (image * 255).round().astype('uint8')" if array.dtype.kind == "f" else ""
        )
        raise InvalidTensor(f"pixels must be {_LAYOUTS}, got {_described(array)}{hint}")
    if array.ndim == 4:
        raise InvalidTensor(f"expected one image, got a batch {list(array.shape)}: use the …_many method")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise InvalidTensor(f"pixels must be {_LAYOUTS}, and not empty, got {_described(array)}")
    pixels = array if array.ndim == 3 else array[:, :, np.newaxis]
    if pixels.shape[2] not in (1, 3):
        raise InvalidTensor(f"the last axis is the channels, 1 (grey) or 3 (RGB), got {_described(array)}")
    return pixels


def _described(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _is_pil(image: object) -> TypeGuard[PilImage]:
    return any(cls.__module__.partition(".")[0] == "PIL" and cls.__name__ == "Image" for cls in type(image).__mro__)


def _png(image: PilImage) -> bytes:
    if image.mode in _RGB_MODES:
        image = image.convert("RGB")
    if image.mode not in _PNG_MODES:
        raise InvalidImage(f"a PIL image of mode {image.mode}: scale it to 8 bits and convert it to L or RGB first")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # loopback and data-centre networks are faster than zlib at 6
    return buffer.getvalue()
