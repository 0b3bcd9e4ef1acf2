"""Results for images: boxes of objects, and the class of every pixel; made from protobuf replies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rafaga.client import _html
from rafaga.client._results import Float32Array, ModelInfo, Timing, model_info, timing
from rafaga.errors import InternalError, listed
from rafaga.v1 import vision_pb2


@dataclass(frozen=True)
class Box:
    """Corners in pixels of the image as it was sent, counted from its upper left corner."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float

    @property
    def width(self) -> float:
        return self.x_max - self.x_min

    @property
    def height(self) -> float:
        return self.y_max - self.y_min

    def __repr__(self) -> str:
        return f"Box({self.x_min:.1f}, {self.y_min:.1f}, {self.x_max:.1f}, {self.y_max:.1f})"


@dataclass(frozen=True)
class DetectedObject:
    label: str
    index: int
    score: float
    box: Box

    def __repr__(self) -> str:
        return f"DetectedObject({self.label!r}, score={self.score:.4f}, {self.box!r})"


@dataclass(frozen=True)
class Detections:
    """The objects in one image, best first; may be empty."""

    objects: tuple[DetectedObject, ...]
    image_height: int
    image_width: int
    model: ModelInfo
    timing: Timing

    def __getitem__(self, number: int) -> DetectedObject:
        return self.objects[number]

    def __iter__(self) -> Iterator[DetectedObject]:
        return iter(self.objects)

    def __len__(self) -> int:
        return len(self.objects)

    def __repr__(self) -> str:
        return f"Detections([{listed(self.objects)}], model={str(self.model)!r})"

    def _repr_html_(self) -> str:
        rows = [(o.label, o.score, *map(float, dataclasses.astuple(o.box))) for o in self]
        headings = ("label", "score", "left", "top", "right", "bottom")
        drawn = [(o.label, o.index, (o.box.x_min, o.box.y_min, o.box.width, o.box.height)) for o in self]
        outline = _html.boxes(self.image_height, self.image_width, drawn)
        return outline + _html.table(self.model, headings, rows, [o.index for o in self])


@dataclass(frozen=True)
class SegmentedClass:
    """One class of a segmentation. share: of the image's pixels, 0 to 1; probability: mean over its pixels."""

    label: str
    index: int
    share: float
    probability: float

    def __repr__(self) -> str:
        return f"SegmentedClass({self.label!r}, index={self.index}, share={self.share:.4f})"


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The class of every pixel of one image.

    labels: uint8 [height, width] at the size the model worked at, which covers the whole image. probabilities: of those
    classes, float32 [height, width], or None if they were not requested. classes: those that occur, the largest first.
    Arrays are read-only.
    """

    labels: npt.NDArray[np.uint8]
    probabilities: Float32Array | None
    classes: tuple[SegmentedClass, ...]
    image_height: int
    image_width: int
    model: ModelInfo
    timing: Timing

    def __iter__(self) -> Iterator[SegmentedClass]:
        return iter(self.classes)

    def __len__(self) -> int:
        return len(self.classes)

    def full_size(self) -> npt.NDArray[np.uint8]:
        """The labels on the image as it was sent: uint8 [image_height, image_width], by nearest neighbour."""
        rows, columns = (
            (np.arange(wanted) * 2 + 1) * there // (2 * wanted)  # the cell that the pixel's centre lies in
            for wanted, there in zip((self.image_height, self.image_width), self.labels.shape, strict=True)
        )
        full: npt.NDArray[np.uint8] = self.labels[rows[:, np.newaxis], columns]
        return full

    def mask(self, label: str) -> npt.NDArray[np.bool_]:
        """bool [height, width]: True where the class is `label`."""
        found = [c.index for c in self.classes if c.label == label]
        return np.isin(self.labels, found)

    def __repr__(self) -> str:
        height, width = self.labels.shape
        return f"Segmentation({height}x{width}, [{listed(self.classes)}], model={str(self.model)!r})"

    def _repr_html_(self) -> str:
        rows = [(c.label, c.share, c.probability) for c in self]
        classes = [c.index for c in self]
        return _html.label_map(self.labels) + _html.table(self.model, ("label", "share", "probability"), rows, classes)


def detections(reply: vision_pb2.DetectResponse, images: int) -> list[Detections]:
    """One per image. InternalError where the reply does not answer what was asked."""
    _require(images, len(reply.results))
    model, spent = model_info(reply.model), timing(reply.timing)
    return [
        Detections(tuple(map(_object, r.objects)), r.image_height, r.image_width, model, spent) for r in reply.results
    ]


def segmentations(reply: vision_pb2.SegmentResponse, images: int) -> list[Segmentation]:
    """One per image. InternalError where the reply does not answer what was asked."""
    _require(images, len(reply.results))
    model, spent = model_info(reply.model), timing(reply.timing)
    return [
        Segmentation(
            labels=_map(result.labels, "u1", result).astype(np.uint8, copy=False),
            probabilities=_map(result.probabilities, "<f4", result).astype(np.float32, copy=False)
            if result.probabilities
            else None,
            classes=tuple(SegmentedClass(c.label, c.index, c.share, c.probability) for c in result.classes),
            image_height=result.image_height,
            image_width=result.image_width,
            model=model,
            timing=spent,
        )
        for result in reply.results
    ]


def _object(found: vision_pb2.DetectedObject) -> DetectedObject:
    box = found.box
    return DetectedObject(found.label, found.index, found.score, Box(box.x_min, box.y_min, box.x_max, box.y_max))


def _map(data: bytes, dtype: str, result: vision_pb2.Segmentation) -> npt.NDArray[np.generic]:
    shape = (result.height, result.width)
    array = np.frombuffer(data, dtype)
    if not array.size or array.size != shape[0] * shape[1]:
        raise InternalError(f"{len(data)} bytes do not make a map of {shape[0]} x {shape[1]} pixels")
    return array.reshape(shape)


def _require(images: int, results: int) -> None:
    if results != images:
        raise InternalError(f"expected results for {images} images, the reply has {results}")
