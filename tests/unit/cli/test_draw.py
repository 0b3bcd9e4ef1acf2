"""Boxes and classes drawn on images."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rafaga import Box, DetectedObject, Detections, ModelInfo, Segmentation, SegmentedClass, Timing
from rafaga.cli._draw import drawn
from rafaga.cli._errors import ExitCode
from tests.unit.cli.conftest import Rafaga

ANSWERED = (ModelInfo("m", 1, True, "fp32"), Timing(0, 0, 0, 1))


def png(height: int, width: int, orientation: int = 1) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), (100, 100, 100)).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def test_boxes_and_labels() -> None:
    boxes = {3: Box(20, 30, 60, 70), 4: Box(0, 0, 5, 5)}  # the second label would lie outside
    objects = tuple(DetectedObject(f"thing {index}", index, 0.9, box) for index, box in boxes.items())
    pixels = np.asarray(drawn(png(100, 200), Detections(objects, 100, 200, *ANSWERED)))
    assert pixels.shape == (100, 200, 3)
    assert (pixels[50, 20] != 100).any(), "the left edge"
    assert (pixels[50, 40] == 100).all(), "the inside"
    assert (pixels[25, 22:60] != 100).any(), "the label is above the box"
    assert (pixels[0, 6:12] != 100).any(), "moved into the image"
    on_its_side = png(100, 200, orientation=6)
    assert drawn(on_its_side, Detections((), 200, 100, *ANSWERED)).size == (100, 200)


def test_classes_cover_the_image_but_its_background() -> None:
    labels = np.zeros((10, 20), np.uint8)
    labels[:, 10:] = 2
    classes = (SegmentedClass("background", 0, 0.5, 0.9), SegmentedClass("cat", 2, 0.5, 0.9))
    answer = Segmentation(labels, None, classes, 100, 200, *ANSWERED)
    pixels = np.asarray(drawn(png(100, 200), answer))
    assert (pixels[80:, :100] == 100).all()
    assert (pixels[80:, 100:] != 100).any(axis=2).all()
    assert (pixels[4:16, 4:30] != 100).any(), "the name of the class"


def test_without_pillow_it_says_what_to_install(
    images: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rafaga: Rafaga
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    said = "rafaga: --draw needs PIL, which is not installed: pip install pillow\n"
    assert rafaga("detect", images[0], "--draw", str(tmp_path / "drawn.png")) == (ExitCode.OTHER, "", said)
