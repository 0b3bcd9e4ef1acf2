"""Words of a command line as values, for argparse: each converter says what it expected."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable

from rafaga.load.figures import Objective
from rafaga.load.payloads import Rows, Size


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


def rows(text: str) -> Rows:
    count, weight = _weighted(text)
    return Rows(whole(count), weight)


def size(text: str) -> Size:
    both, weight = _weighted(text)
    height, _, width = both.lower().partition("x")
    return Size(whole(height), whole(width), weight)


def model(text: str) -> tuple[str, float]:
    name, weight = _weighted(text)
    if not name:
        raise ArgumentTypeError(f"{text!r} names no model")
    return name, weight


def objective(text: str) -> Objective:
    """ "50", "lenet5=10" and both: "50,lenet5=10"."""
    p99_ms: float | None = None
    by_model: dict[str, float] = {}
    for part in text.split(","):
        name, equals, bound = part.rpartition("=")
        if (name in by_model) or bool(equals) != bool(name) or (not name and p99_ms is not None):
            raise ArgumentTypeError(f"{text!r} is not MS or MODEL=MS with commas between, each once")
        if name:
            by_model[name] = positive(bound)
        else:
            p99_ms = positive(bound)
    return Objective(p99_ms, by_model)


def _weighted(text: str) -> tuple[str, float]:
    what, equals, weight = text.partition("=")
    return what, positive(weight) if equals else 1.0
