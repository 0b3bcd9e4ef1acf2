"""Words of a command line as numbers, for argparse: each converter says what it expected."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable


def _number(allowed: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and allowed(value)):
            raise ArgumentTypeError(f"{text!r} is no {expected}")
        return value

    return convert


positive = _number(lambda value: value > 0, "positive number")
not_negative = _number(lambda value: value >= 0, "number from zero up")


def index(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is no whole number from 0 up")
    return int(text)


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    return whole(height), whole(width)
