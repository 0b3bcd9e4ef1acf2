"""Your own detector, one of torchvision's classes: what it says about its images and labels, and the proof that its own
post-processing is the one that is exported."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from export import verify
from export.arrays import Arrays
from export.graph import ImageGraph, ServingGraph
from export.verify import PARITY_GATE, ProofFailed
from models.detectors import Detector, DetectorInvalid
from models.entry import ImageInput
from rafaga.bundle import DetectionSpec

_BACKGROUND = "__background__"  # as torchvision calls it


def image_input(detector: Detector, bgr: bool, exif_orientation: bool) -> ImageInput:
    """What the transform does. Raises DetectorInvalid."""
    transform = detector.original[0].transform
    mean, std = tuple(map(float, transform.image_mean)), tuple(map(float, transform.image_std))
    if len(mean) not in (1, 3):
        raise DetectorInvalid(f"images of {len(mean)} channels; expected 1 or 3")
    width, height = transform.fixed_size or (None, None)
    shorter, longer = (None, None) if height else (transform.min_size[-1], transform.max_size)
    return ImageInput(height, width, len(mean), mean, std, shorter, longer, bgr=bgr, exif_orientation=exif_orientation)


def limits(detector: Detector) -> DetectionSpec:
    return DetectionSpec(
        max_objects=detector.max_objects,
        score_threshold=detector.score_threshold,
        iou_threshold=detector.iou_threshold,
    )


def with_background(names: tuple[str, ...], detector: Detector) -> tuple[str, ...]:
    """A name for each class; files often leave out the background. Raises DetectorInvalid."""
    if len(names) not in (detector.classes - 1, detector.classes):
        raise DetectorInvalid(
            f"{len(names)} labels, but {detector.classes} classes with the background: give --labels with "
            f"{detector.classes - 1} names, or {detector.classes} in the order of the classes"
        )
    return names if len(names) == detector.classes else (_BACKGROUND, *names)


def require_same_objects(graph: ServingGraph, inputs: Arrays) -> None:
    """Compares with the detector's own forward, on images that it does not resize. Raises ProofFailed, also where
    nothing is found."""
    ours, module = graph.reference(inputs), graph.module
    if not ours["scores"].any():
        raise ProofFailed(
            "nothing is found in the images of the checks, so they prove nothing: give photos with objects by "
            "--eval-images DIR"
        )
    if not isinstance(module, ImageGraph) or not isinstance(module.model, Detector):
        return
    detector: Any = module.model.original[0]
    pixels = torch.from_numpy(inputs["image"]).permute(0, 3, 1, 2).float() / 255
    images = list(pixels.flip(1) if module.bgr else pixels)
    transform, sides = detector.transform, pixels.shape[2:]
    sizes = transform.min_size, transform.max_size
    transform.min_size, transform.max_size = (min(sides),), max(sides)
    try:
        with torch.inference_mode():
            found = detector.eval()(images)
    finally:
        transform.min_size, transform.max_size = sizes
    theirs = {name: np.zeros_like(array) for name, array in ours.items()}
    for row, objects in enumerate(found):
        for name, array in theirs.items():
            array[row, : len(objects[name])] = objects[name].numpy()
    error = verify.relative_difference(ours, theirs)
    if not error <= PARITY_GATE:
        raise ProofFailed(
            f"{type(detector).__name__} gives other objects than torchvision's post-processing, which is exported in "
            f"place of its own: largest relative difference {error:.1e}, allowed {PARITY_GATE:.0e}"
        )
