"""Readers: each takes what was configured (text, or a value of TOML), checks it, and returns the setting's value.

They raise ValueError with what came and what was expected; the caller adds which setting it was and where it was set.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from rafaga.server.config.per_model import PerModel

T = TypeVar("T")
D = TypeVar("D")
E = TypeVar("E", bound=StrEnum)

_BOOLEANS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}


def integer(low: int, high: int | None = None) -> Callable[[object], int]:
    expected = f"at least {low}" if high is None else f"{low} to {high}"

    def read(value: object) -> int:
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"{_shown(value)} is not an integer")
        if number < low or (high is not None and number > high):
            raise ValueError(f"{number}: expected {expected}")
        return number

    return read


def number(expected: str, allowed: Callable[[float], bool]) -> Callable[[object], float]:
    def read(value: object) -> float:
        try:
            number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
        except ValueError:
            number = None
        if number is None:
            raise ValueError(f"{_shown(value)} is not a number")
        if not allowed(number):
            raise ValueError(f"{number:g}: expected {expected}")
        return number

    return read


# NaN fails every comparison.
positive = number("more than zero", lambda value: 0 < value < math.inf)
not_negative = number("zero or more", lambda value: 0 <= value < math.inf)
ratio = number("0 to 1", lambda value: 0 <= value <= 1)


def boolean(value: object) -> bool:
    word = str(value).lower()
    if word not in _BOOLEANS:
        raise ValueError(f"{_shown(value)}: expected on or off")
    return _BOOLEANS[word]


def choice(kind: type[E]) -> Callable[[object], E]:
    def read(value: object) -> E:
        try:
            return kind(str(value))
        except ValueError:
            raise ValueError(f"{_shown(value)}: expected one of {', '.join(kind)}") from None

    return read


def text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{_shown(value)}: expected text")
    return value


def host(value: object) -> str:
    """A name or an address; IPv6 with or without brackets."""
    name = text(value).strip().removeprefix("[").removesuffix("]")
    if not name or any(character in name for character in "/ ,"):
        raise ValueError(f"{_shown(value)}: expected a host name or an IP address, without a port")
    return name


def path(value: object) -> Path:
    if not isinstance(value, str | Path):
        raise ValueError(f"{_shown(value)}: expected a path")
    return Path(value)


def sha256(value: object) -> str:
    """In hex. The error does not repeat the value: it may be the secret itself, set by mistake."""
    if not isinstance(value, str) or len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ValueError("expected 64 lower-case hex digits (the sha256 of a token) each")
    if value in {hashlib.sha256(empty).hexdigest() for empty in (b"", b"\n")}:
        raise ValueError("this is the sha256 of an empty token: check how the hash was made")
    return value


def token_hashes(value: object) -> tuple[str, ...]:
    """() for `none`. An empty value is refused: a variable or a Secret that was left empty must not open the server."""
    given = words(value)
    if not given:
        raise ValueError("expected hashes, or none")
    return () if given == ["none"] else tuple(sha256(word) for word in given)


def each(read: Callable[[str], T]) -> Callable[[object], tuple[T, ...]]:
    return lambda value: tuple(read(word) for word in words(value))


def per_model(read: Callable[[str], T], default: D) -> Callable[[object], PerModel[T | D]]:
    return lambda value: PerModel.parse(words(value), read, default)


def or_auto(read: Callable[[object], T]) -> Callable[[object], T | None]:
    """None for `auto`."""

    def read_unless_auto(value: object) -> T | None:
        try:
            return None if value == "auto" else read(value)
        except ValueError as error:
            raise ValueError(f"{error} (or auto)") from None

    return read_unless_auto


def words(value: object) -> list[str]:
    """A list may be written as text with commas; a list of one as its only value."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    values = value if isinstance(value, list | tuple) else [value]
    return [item if isinstance(item, str) else str(item).lower() for item in values]


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}…"
