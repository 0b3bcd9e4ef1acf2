"""Images as people hold them, brought to the two forms of the wire. Everything wrong with them is told before any call.

Files, bytes and PIL images are *images*: they travel encoded, and the server resizes and crops them the way the model
was trained. Arrays are *pixels*: they are used as they are, so their size must be one that the model accepts.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from rafaga.errors import InvalidImage, InvalidRequest, InvalidTensor
from rafaga.v1 import vision_pb2

_LAYOUTS = "uint8 [height, width], [height, width, channels] or [batch, height, width, channels]"

# What PNG stores, and what converts to RGB without losing anything a model would see. Others (16-bit, float) would be
# clipped to 255 by a conversion: how to scale them is the caller's knowledge.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
_RGB_MODES = frozenset({"CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa", "PA", "La"})


class PilImage(Protocol):
    """What is used of PIL.Image.Image; PIL itself is never imported here."""

    @property
    def mode(self) -> str: ...
    def convert(self, mode: str) -> PilImage: ...
    def save(self, fp: Any, /, *args: Any, **options: Any) -> None: ...


ImageInput: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | PilImage | npt.NDArray[np.uint8]
"""A path, an encoded image (JPEG, PNG), a PIL image, or pixels as a uint8 array."""

Wire: TypeAlias = vision_pb2.EncodedImages | vision_pb2.ImageTensor


def encode(image: ImageInput) -> bytes | npt.NDArray[Any]:
    """Reads the file or encodes the PIL image (lossless); arrays and bytes pass through.

    Raises OSError for a file that cannot be read, InvalidImage for an empty one, InvalidTensor for another type.
    """
    if isinstance(image, np.ndarray):
        return image
    if isinstance(image, str | os.PathLike):
        content = Path(image).read_bytes()
        if not content:
            raise InvalidImage(f"{os.fspath(image)} is empty; expected a JPEG or PNG file")
        return content
    if isinstance(image, bytes | bytearray | memoryview):
        if not len(image):
            raise InvalidImage("the image has no bytes; expected a JPEG or PNG file's content")
        return bytes(image)
    if _is_pil(image):
        return _png(image)
    raise InvalidTensor(
        f"an image of type {type(image).__qualname__}; expected a path, bytes, a PIL image or a numpy array {_LAYOUTS}"
    )


def load(images: Any) -> Any:
    """The same image or images, files read and PIL images encoded: what takes time, for callers that must not wait."""
    if isinstance(images, list | tuple):
        return [encode(image) for image in images]
    return encode(images)


def single(image: ImageInput) -> Wire:
    """One image. InvalidTensor for a batch."""
    content = encode(image)
    if isinstance(content, bytes):
        return vision_pb2.EncodedImages(images=[content])
    pixels = _pixels(content)
    if content.ndim == 4:
        raise InvalidTensor(f"expected one image, got a batch {list(content.shape)}: ask for many at once instead")
    return _tensor(pixels)


def many(images: Sequence[ImageInput] | npt.NDArray[np.uint8]) -> Wire:
    """A batch: uint8 [batch, height, width, channels], or a sequence of images of one kind.

    Arrays in a sequence must have one shape. InvalidTensor or InvalidRequest otherwise, and for no images at all.
    """
    if isinstance(images, np.ndarray):
        if images.ndim != 4:
            raise InvalidTensor(
                f"a batch must be uint8 [batch, height, width, channels], got {_described(images)}; "
                "grey images need a last axis: images[..., numpy.newaxis]"
            )
        return _tensor(_pixels(images))
    if isinstance(images, str | bytes | os.PathLike):
        raise InvalidRequest("expected a sequence of images, got one; put it in a list")
    contents = [encode(image) for image in images]
    if not contents:
        raise InvalidRequest("no images; expected at least one")
    encoded = [content for content in contents if isinstance(content, bytes)]
    if len(encoded) == len(contents):
        return vision_pb2.EncodedImages(images=encoded)
    if encoded:
        raise InvalidRequest("encoded images and arrays in one request; send them in two")
    rows = [_pixels(content) for content in contents if isinstance(content, np.ndarray)]
    shapes = sorted({row.shape[1:] for row in rows})
    if len(shapes) > 1:
        raise InvalidTensor(f"arrays of different shapes in one request: {', '.join(str(list(s)) for s in shapes)}")
    return _tensor(np.concatenate(rows))


def rows(wire: Wire) -> int:
    """How many images."""
    return len(wire.images) if isinstance(wire, vision_pb2.EncodedImages) else wire.batch


def is_batch(image: object) -> bool:
    """Whether the caller's value has a batch axis."""
    return (isinstance(image, np.ndarray) and image.ndim == 4) or isinstance(image, list | tuple)


def _pixels(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """uint8 [batch, height, width, channels] of any accepted layout."""
    if array.dtype != np.uint8:
        hint = (
            "; values in 0..1 become pixels by (image * 255).round().astype('uint8')" if array.dtype.kind == "f" else ""
        )
        raise InvalidTensor(f"pixels must be {_LAYOUTS}, got {_described(array)}{hint}")
    if array.ndim == 2:
        array = array[np.newaxis, :, :, np.newaxis]
    elif array.ndim == 3:
        array = array[np.newaxis]
    if array.ndim != 4 or 0 in array.shape:
        raise InvalidTensor(f"pixels must be {_LAYOUTS}, none of them empty, got {_described(array)}")
    if array.shape[3] not in (1, 3):
        raise InvalidTensor(f"the last axis is the channels, 1 (grey) or 3 (RGB), got {_described(array)}")
    return array


def _tensor(pixels: npt.NDArray[np.uint8]) -> vision_pb2.ImageTensor:
    batch, height, width, channels = pixels.shape
    return vision_pb2.ImageTensor(data=pixels.tobytes(), batch=batch, height=height, width=width, channels=channels)


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
