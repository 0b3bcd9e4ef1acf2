"""Joins the rows of requests into the arrays of a batch, and pads them. Every engine does it here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rafaga.server.scheduling.job import Arrays, Part

Array = NDArray[np.generic]
Shape = tuple[int, ...]


def blocks_of(parts: Sequence[Part], index: int) -> list[Array]:
    """The rows of all parts for one input of the model, without a copy."""
    return [
        job.inputs[index] if stop - start == job.rows else job.inputs[index][start:stop] for job, start, stop in parts
    ]


def assemble(parts: Sequence[Part], rows: int = 0) -> Arrays:
    """The rows of all parts, one array per input: one copy, or none for a lone part.

    Rows of different lengths (ragged series) are padded with zeros on the right up to the longest. `rows`: pads the
    batch to as many rows, as `write` does.
    """
    inputs = range(len(parts[0].job.inputs))
    if len(parts) == 1 and rows in (0, parts[0].stop - parts[0].start):
        return tuple(_aligned(*blocks_of(parts, index)) for index in inputs)
    return tuple(_joined(blocks_of(parts, index), rows) for index in inputs)


def joined_shape(blocks: Sequence[Array], rows: int = 0) -> Shape:
    """The shape of all blocks together. `rows`: at least as many."""
    return (max(rows, sum(map(len, blocks))), *_tail(blocks))


def write(blocks: Sequence[Array], batch: Array) -> None:
    """Writes the blocks into `batch`, of the shape that `joined_shape` gives.

    Shorter rows are padded with zeros on the right. Missing rows are copies of the last one: it is a valid input, which
    a row of zeros may not be.
    """
    row = sum(map(len, blocks))
    if all(block.shape[1:] == batch.shape[1:] for block in blocks):
        np.concatenate(blocks, out=batch[:row])
    else:
        batch[:row] = 0
        at = 0
        for block in blocks:
            batch[(slice(at, at + len(block)), *map(slice, block.shape[1:]))] = block
            at += len(block)
    if row < len(batch):
        batch[row:] = batch[row - 1]


def padding_rows(parts: Sequence[Part]) -> float:
    """The padding of ragged rows in the first input, in rows: two series of half the longest's length count as one."""
    rows = [part.stop - part.start for part in parts]
    tails = [part.job.inputs[0].shape[1:] for part in parts]
    full = math.prod(map(max, zip(*tails, strict=True)))
    return sum(n * (1 - math.prod(tail) / full) for n, tail in zip(rows, tails, strict=True)) if full else 0.0


def _joined(blocks: Sequence[Array], rows: int) -> Array:
    batch = np.empty(joined_shape(blocks, rows), blocks[0].dtype)
    write(blocks, batch)
    return batch


def _tail(blocks: Sequence[Array]) -> Shape:
    first = blocks[0].shape[1:]
    if all(block.shape[1:] == first for block in blocks):
        return first
    return tuple(map(max, zip(*(block.shape[1:] for block in blocks), strict=True)))


def _aligned(array: Array) -> Array:
    """Kernels may rely on alignment, and tensors of a request start at any byte."""
    return array if array.flags.aligned else array.copy()
