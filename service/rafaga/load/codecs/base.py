"""What all protocols share: requests as bytes, what a reply says, and when two answers are equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rafaga.load.log import Reply


class Wire(StrEnum):
    """The protocols of `--protocol`."""

    RAFAGA = "rafaga"
    OPEN_INFERENCE = "open-inference"


class Replies(StrEnum):
    """Kinds of replies, by the message. A name and no object, so that it travels to other processes."""

    CLASSIFY = "classify"
    FEATURES = "features"
    FORECAST = "forecast"
    DETECT = "detect"
    SEGMENT = "segment"
    PREDICT = "predict"
    INFER = "infer"


class Reader(Protocol):
    """Reads one kind of reply."""

    def timing(self, reply: bytes) -> Reply:
        """Where the server spent its time, as far as the reply says."""

    def same(self, reply: bytes, reference: bytes) -> bool:
        """Whether both give the same answer, up to what the order of floating-point sums may change."""


@dataclass(frozen=True)
class Request:
    """One of the requests to a model.

    weight: how often it is drawn, beside the model's others. drawn: whether it is at all; others are sent only where a
    trace asks for as many rows. reference: the reply, taken before the load began.
    """

    body: bytes
    rows: int = 1
    weight: float = 1.0
    drawn: bool = True
    reference: bytes | None = None


@dataclass(frozen=True)
class Target:
    """One model of a mix: which requests go to which method, and how often."""

    model: str
    weight: float
    method: str
    requests: tuple[Request, ...]
    replies: Replies


def close(values: Sequence[NDArray[np.generic]], expected: Sequence[NDArray[np.generic]]) -> bool:
    """Whether all arrays agree to a thousandth of the largest number expected in each: fp16 has not much more."""
    return len(values) == len(expected) and all(map(_close, values, expected))


def tolerance(expected: NDArray[np.generic]) -> float:
    return 1e-3 * float(np.abs(expected).max(initial=0.0))


def _close(value: NDArray[np.generic], expected: NDArray[np.generic]) -> bool:
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return False
    if value.dtype.kind != "f":
        return bool((value == expected).all())
    return bool(np.allclose(value, expected, rtol=0.0, atol=tolerance(expected), equal_nan=True))
