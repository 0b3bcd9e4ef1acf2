"""Arguments of `rafaga load` and `rafaga plan`: converters for argparse, and the options that both commands have."""

from __future__ import annotations

import argparse
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rafaga.load.connection import Connection
from rafaga.load.figures import Objective
from rafaga.load.payloads import Payloads, Rows, Size, read
from rafaga.options import credentials, number, positive, whole

T = TypeVar("T")


class OptionsError(Exception):
    """Options that do not go together, or a value that cannot be used."""


not_negative = number(lambda value: value >= 0, "a number ≥ 0")


def index(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r}: must be an integer ≥ 0")
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
        raise ArgumentTypeError(f"{text!r}: the name of the model is missing")
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


def each_once(option: str, given: Sequence[T], name: Callable[[T], str]) -> tuple[T, ...]:
    names = [name(each) for each in given]
    if twice := [each for each in names if names.count(each) > 1]:
        raise OptionsError(f"{option} {twice[0]} is given more than once")
    return tuple(given)


def add_inputs(group: argparse._ArgumentGroup) -> None:
    """What `inputs` reads."""
    group.add_argument(
        "--input",
        action="append",
        default=[],
        type=Path,
        metavar="FILE|DIR",
        help="images (.jpg, .png, .webp, .gif, .bmp) or series (.csv, .txt) to send; random ones otherwise",
    )
    group.add_argument("--column", metavar="NAME", help="column of the series to send, by name or number from 1")
    group.add_argument(
        "--rows",
        action="append",
        type=rows,
        metavar="N[=WEIGHT]",
        help="images per request; several make a mix (1)",
    )
    group.add_argument(
        "--size",
        action="append",
        type=size,
        metavar="HxW[=WEIGHT]",
        help="size of random images where the model takes any; several make a mix (224x224)",
    )
    group.add_argument(
        "--seed", type=index, default=0, metavar="N", help="random seed of arrivals, mix and inputs (%(default)s)"
    )


def inputs(args: Namespace) -> Payloads:
    """Raises OptionsError, PayloadError or OSError."""
    rows = each_once("--rows", args.rows or [Rows()], lambda each: str(each.count))
    sizes = each_once("--size", args.size or [Size()], lambda each: f"{each.height}x{each.width}")
    try:
        return read(args.input, args.column, rows=rows, sizes=sizes, seed=args.seed)
    except UnicodeDecodeError as error:
        raise OptionsError(f"--input: not text: {error}") from None


def add_processes(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--processes", type=whole, default=1, metavar="N", help="generator processes on this machine (%(default)s)"
    )
    group.add_argument("--channels", type=whole, default=8, metavar="N", help="connections per process (%(default)s)")


def connection(address: str, args: Namespace) -> Connection:
    """Raises OptionsError or OSError."""
    try:
        given = credentials(args)
    except argparse.ArgumentTypeError as error:
        raise OptionsError(str(error)) from None
    found = Connection(address, *given)
    try:
        found.endpoint()
    except ValueError as error:
        raise OptionsError(f"server {address}: {error}") from None
    return found
