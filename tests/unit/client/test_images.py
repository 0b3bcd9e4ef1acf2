"""Images of every accepted kind reach the wire exactly; all others are refused before it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rafaga import InvalidImage, InvalidRequest, InvalidTensor
from rafaga.client import _calls, _images
from rafaga.v1 import vision_pb2

GREY = np.arange(6, dtype=np.uint8).reshape(2, 3)
RGB = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)


def wire(*images: Any) -> vision_pb2.ClassifyRequest:
    request = vision_pb2.ClassifyRequest()
    _images.put(request, [_images.content(image) for image in images])
    return request


@pytest.mark.parametrize("array", [GREY, GREY[..., None], RGB, RGB.transpose(1, 0, 2)])
def test_an_array_travels_row_major_with_its_shape(array: np.ndarray) -> None:
    pixels = wire(array).pixels
    shape = array.shape if array.ndim == 3 else (*array.shape, 1)
    assert (pixels.batch, pixels.height, pixels.width, pixels.channels) == (1, *shape)
    assert pixels.data == array.tobytes()


WRONG_SHAPES = ((), (6,), (1, 1, 1, 1, 1), (0, 3), (4, 4, 4), (3, 224, 224), (2, 4, 4, 3))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *((np.zeros(shape, np.uint8), "uint8|channels|one image") for shape in WRONG_SHAPES),
        (np.zeros((28, 28)), r"\(image \* 255\)"),
        *((bad, "uint8") for bad in (GREY.astype(np.int64), GREY.astype(bool), [[1, 2], [3, 4]], 3.5, None)),
    ],
)
def test_other_values_are_invalid_tensors(bad: Any, message: str) -> None:
    with pytest.raises(InvalidTensor, match=message):
        wire(bad)


@pytest.mark.parametrize(
    ("images", "error"),
    [("digit.png", InvalidRequest), (b"\x89PNG", InvalidRequest), (7, InvalidRequest), (RGB, InvalidTensor)],
)
def test_one_image_is_not_several(images: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        _images.several(images)


def test_files_and_bytes_travel_untouched(tmp_path: Path) -> None:
    path = tmp_path / "digit.png"
    path.write_bytes(b"any bytes: the server decodes")
    for image in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), memoryview(path.read_bytes())):
        assert list(wire(image).encoded.images) == [path.read_bytes()]
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidImage, match="empty"):
        wire(tmp_path / "empty")
    with pytest.raises(InvalidImage):
        wire(b"")
    with pytest.raises(FileNotFoundError):
        wire(tmp_path / "absent")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_pil_images_travel_without_loss(mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    found = wire(image)
    back = Image.open(io.BytesIO(found.encoded.images[0]))
    assert (back.mode, back.size) == (mode, image.size)
    np.testing.assert_array_equal(np.asarray(back), np.asarray(image))


def test_cmyk_becomes_rgb_and_deep_images_are_refused() -> None:
    found = wire(Image.fromarray(RGB).convert("CMYK"))
    assert Image.open(io.BytesIO(found.encoded.images[0])).mode == "RGB"
    for mode in ("I", "F"):
        with pytest.raises(InvalidImage, match="8 bits"):
            wire(Image.new(mode, (2, 2)))


def test_a_series_and_a_frame_of_images() -> None:
    pandas = pytest.importorskip("pandas")
    paths = pandas.Series(["a.png", "b.png"], name="file")
    assert list(_images.several(paths)) == ["a.png", "b.png"]
    assert list(_images.several(paths.to_frame())) == ["a.png", "b.png"]
    with pytest.raises(InvalidTensor, match="expected one column, got a frame with file, label: choose one"):
        _images.several(pandas.DataFrame({"file": paths, "label": paths}))


def test_symbols_of_every_kind() -> None:
    pandas = pytest.importorskip("pandas")
    series = pandas.Series(["B", "T"])
    for given in ("BT", ["B", "T"], ("B", "T"), np.array(["B", "T"]), series, series.to_frame()):
        assert _calls.symbols(given).content == ["B", "T"]
    for wrong in ("", [1], series.to_frame().assign(other="x")):
        with pytest.raises(InvalidRequest):
            _calls.symbols(wrong)  # type: ignore[arg-type]
