"""The inputs to send: the user's files, or random pixels and series of a shape that the model takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from rafaga.options import IMAGES, files_in
from rafaga.series import SeriesError, read_series

# Different requests, so that no cache on the way makes the load lighter than it looks.
RANDOM_PAYLOADS = 16
_AT_LEAST = 4  # of each kind in a mix
MAX_FILES = 256
DEFAULT_SIZE = (224, 224)
_SERIES = frozenset({".csv", ".txt"})


class PayloadError(Exception):
    """An input that cannot be sent; the message names it and says what was expected."""


T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Rows:
    """A number of images per request, and its weight in a mix. drawn: False if it is sent only when a trace asks for
    it.
    """

    count: int = 1
    weight: float = 1.0
    drawn: bool = True


@dataclass(frozen=True)
class Size:
    """Size in pixels of random images, for models that take any size, and its weight in a mix."""

    height: int = DEFAULT_SIZE[0]
    width: int = DEFAULT_SIZE[1]
    weight: float = 1.0


@dataclass(frozen=True)
class Payload(Generic[T]):
    """The content of one request. weight: how often it is sent, relative to the others; drawn: as for Rows."""

    content: T
    rows: int = 1
    weight: float = 1.0
    drawn: bool = True

    def holding(self, content: U) -> Payload[U]:
        return Payload(content, self.rows, self.weight, self.drawn)


@dataclass(frozen=True)
class Payloads:
    """The user's inputs, and how random ones are made for models that none of them fits. images: encoded files. series:
    histories. rows and sizes: mixes, every number of rows in every size. seed: of everything random.
    """

    images: tuple[bytes, ...] = ()
    series: tuple[tuple[float, ...], ...] = ()
    rows: tuple[Rows, ...] = (Rows(),)
    sizes: tuple[Size, ...] = (Size(),)
    seed: int = 0

    def with_rows(self, counts: Iterable[int]) -> Payloads:
        """A copy that also has requests of these numbers of rows, which are sent only when a trace asks for them."""
        known = {rows.count for rows in self.rows}
        return replace(self, rows=self.rows + tuple(Rows(n, drawn=False) for n in sorted(set(counts) - known)))

    def pictures(self) -> list[Payload[tuple[bytes, ...]]]:
        """The user's images, `rows` to a request, each equally often."""
        found = []
        for rows in self.rows:
            groups = math.ceil(len(self.images) / rows.count)
            for group in range(groups):
                chosen = (self.images[(group * rows.count + i) % len(self.images)] for i in range(rows.count))
                found.append(Payload(tuple(chosen), rows.count, rows.weight / groups, rows.drawn))
        return found

    def pixels(self, shape: Sequence[int | None]) -> list[Payload[NDArray[np.uint8]]]:
        """uint8 [rows, height, width, channels] each. shape: the model's; None if any size is accepted."""
        _, height, width, channels = shape
        rng = np.random.default_rng(self.seed)

        def random(each: Payload[Size]) -> NDArray[np.uint8]:
            size = (each.rows, height or each.content.height, width or each.content.width, channels or 3)
            return rng.integers(0, 256, size, dtype=np.uint8)

        return [each.holding(random(each)) for each in self.shapes()]

    def shapes(self) -> list[Payload[Size]]:
        """The requests to fill with random images: several of each kind, and at least RANDOM_PAYLOADS in total."""
        kinds = [(rows, size) for rows in self.rows for size in self.sizes]
        each = max(_AT_LEAST, math.ceil(RANDOM_PAYLOADS / len(kinds)))
        return [
            Payload(size, rows.count, rows.weight * size.weight / each, rows.drawn)
            for rows, size in kinds
            for _ in range(each)
        ]

    def histories(self, length: int) -> list[NDArray[np.float32]]:
        """float32 [length] each: random walks, because most real series are not white noise either."""
        rng = np.random.default_rng(self.seed)
        return [rng.normal(size=length).cumsum().astype(np.float32) for _ in range(RANDOM_PAYLOADS)]

    def symbols(self, alphabet: Sequence[str], length: int) -> list[list[str]]:
        """Rows of `length` symbols each, all equally probable."""
        rng = np.random.default_rng(self.seed)
        chosen = rng.integers(0, len(alphabet), (RANDOM_PAYLOADS, length))
        return [[alphabet[index] for index in row] for row in chosen.tolist()]


def describe(payloads: Payloads) -> str:
    """What is sent, in words."""
    given = [
        f"{len(items)} {name}" for name, items in (("images", payloads.images), ("series", payloads.series)) if items
    ]
    rows = {str(rows.count): rows.weight for rows in payloads.rows}
    words = ", ".join(given) if given else "random inputs"
    if not given or payloads.rows != (Rows(),):
        words += f", {_shares(rows)} to a request"
    if not given and payloads.sizes != (Size(),):
        sizes = {f"{size.height}x{size.width}": size.weight for size in payloads.sizes}
        words += f", {_shares(sizes)} where the model takes any size"
    return words


def _shares(weights: dict[str, float]) -> str:
    if len(weights) == 1:
        return next(iter(weights))
    whole = sum(weights.values())
    return " or ".join(f"{name} ({weight / whole:.0%})" for name, weight in weights.items())


def read(paths: Sequence[Path], column: str | None = None, **options: Any) -> Payloads:
    """Images and series from files and folders, by suffix. Raises PayloadError or OSError. column: of the series."""
    images: list[bytes] = []
    series: list[tuple[float, ...]] = []
    for path in _files(paths):
        if path.suffix.lower() in IMAGES:
            images.append(path.read_bytes())
        else:
            series.append(_history(path, column))
    return Payloads(tuple(images), tuple(series), **options)


def _files(paths: Sequence[Path]) -> list[Path]:
    known = IMAGES | _SERIES
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = files_in(path, known)
            if not found:
                raise PayloadError(f"{path}: no {', '.join(sorted(known))} file in this folder")
            files += found
        elif path.suffix.lower() in known:
            files.append(path)
        else:
            raise PayloadError(f"{path}: expected a folder or a file ending in {', '.join(sorted(known))}")
    # Evenly, so that a folder sorted by class does not become one class.
    return files if len(files) <= MAX_FILES else [files[i * len(files) // MAX_FILES] for i in range(MAX_FILES)]


def _history(path: Path, column: str | None) -> tuple[float, ...]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            return tuple(read_series(file, column))
        except SeriesError as error:
            raise PayloadError(f"{path}: {error}") from None
