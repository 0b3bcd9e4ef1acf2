"""The maps of a backbone: one for each declared name, at the declared stride."""

from __future__ import annotations

import math

import torch

from export.graph import ServingGraph
from export.verify import ProofFailed
from models.entry import Entry, ImageInput

_SMALLEST = 64  # of the images for a backbone of any size


def require_maps(entry: Entry, graph: ServingGraph) -> None:
    """Measures the strides of a backbone, by two images: where one is larger by n strides, so is its map by n cells.

    A module that takes one size only is measured by that size: its map has floor(H / stride) or ceil(H / stride) rows.
    Raises ProofFailed where a map has another stride, or an embedding is not a vector.
    """
    assert isinstance(entry.input, ImageInput)
    size = entry.input.height or _SMALLEST, entry.input.width or _SMALLEST
    shapes = _shapes(graph, entry.input, size)
    for name, stride in entry.strides.items():
        rank = len(shapes[name])
        if rank != (4 if stride else 2):
            expected = "[N, C, H, W] of a map; an embedding has stride 0" if stride else "[N, D] of an embedding"
            raise ProofFailed(f"output {name} has {rank} axes; stride {stride} expects {expected}")
    maps = {name: stride for name, stride in entry.strides.items() if stride}
    if not maps:
        return
    more = 2 * math.lcm(*maps.values())
    try:
        larger: dict[str, tuple[int, ...]] | None = _shapes(graph, entry.input, (size[0] + more, size[1] + more))
    except Exception:  # of a module with a fixed size, anything
        larger = None
    if larger is not None and any(larger[name][:2] != shapes[name][:2] for name in maps):
        larger = None  # it took the larger image for several
    for name, stride in maps.items():
        for axis in (2, 3):
            pixels, cells = size[axis - 2], shapes[name][axis]
            if larger is not None:
                right = larger[name][axis] - cells == more // stride
                pixels, cells = more, larger[name][axis] - cells
            else:
                right = pixels // stride <= cells <= -(-pixels // stride)
            if not right:
                measured = f"{pixels / cells:.3g}" if cells > 0 else "none: its size does not depend on the image's"
                raise ProofFailed(f"map {name} has stride {measured}; declared: {stride}")


def _shapes(graph: ServingGraph, image: ImageInput, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    pixels = torch.full((1, *size, image.channels), 128, dtype=torch.uint8)
    return {name: array.shape for name, array in graph.reference({"image": pixels.numpy()}).items()}
