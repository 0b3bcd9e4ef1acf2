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
    """Kinds of replies, by message. Names, because they are sent to other processes."""

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
        """The server's times, if the reply contains them."""

    def same(self, reply: bytes, reference: bytes) -> bool:
        """Whether both give the same answer, within the rounding that another order of sums may cause."""


@dataclass(frozen=True)
class Request:
    """One of the requests to a model.

    weight: how often it is drawn, relative to the model's other requests. drawn: False if it is sent only when a trace
    asks for that number of rows. reference: its reply, taken before the load began.
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
    """Whether all arrays agree to a thousandth of the largest number expected in each, about the precision of fp16."""
    return len(values) == len(expected) and all(map(_close, values, expected))


def tolerance(expected: NDArray[np.generic]) -> float:
    return 1e-3 * float(np.abs(expected).max(initial=0.0))


def _close(value: NDArray[np.generic], expected: NDArray[np.generic]) -> bool:
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return False
    if value.dtype.kind != "f":
        return bool((value == expected).all())
    return bool(np.allclose(value, expected, rtol=0.0, atol=tolerance(expected), equal_nan=True))
