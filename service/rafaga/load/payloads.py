"""What is sent: files of the user's, or random pixels and series of a shape the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rafaga.series import SeriesError, read_series

# Different requests, so that no cache on the way makes the load lighter than it looks.
RANDOM_PAYLOADS = 16
MAX_FILES = 256
_IMAGES = frozenset({".jpg", ".jpeg", ".png"})
_SERIES = frozenset({".csv", ".txt"})


class PayloadError(Exception):
    """An input that cannot be sent; the message names it and says what was expected."""


@dataclass(frozen=True)
class Payloads:
    """What the user gave, and what is made up where nothing fits.

    images: encoded files. series: histories. rows: images per request of random pixels. height, width: of random
    images for models that take any size. seed: of everything random.
    """

    images: tuple[bytes, ...] = ()
    series: tuple[tuple[float, ...], ...] = ()
    rows: int = 1
    height: int = 224
    width: int = 224
    seed: int = 0

    def pixels(self, shape: Sequence[int | None]) -> list[NDArray[np.uint8]]:
        """uint8 [rows, height, width, channels] each. shape: the model's, None where any size goes."""
        _, height, width, channels = shape
        size = (self.rows, height or self.height, width or self.width, channels or 3)
        rng = np.random.default_rng(self.seed)
        return [rng.integers(0, 256, size, dtype=np.uint8) for _ in range(RANDOM_PAYLOADS)]

    def histories(self, length: int) -> list[NDArray[np.float32]]:
        """float32 [length] each: random walks, as far from white noise as most series are."""
        rng = np.random.default_rng(self.seed)
        return [rng.normal(size=length).cumsum().astype(np.float32) for _ in range(RANDOM_PAYLOADS)]

    def symbols(self, alphabet: Sequence[str], length: int) -> list[list[str]]:
        """Rows of `length` symbols each, any of them as often."""
        rng = np.random.default_rng(self.seed)
        chosen = rng.integers(0, len(alphabet), (RANDOM_PAYLOADS, length))
        return [[alphabet[index] for index in row] for row in chosen.tolist()]


def read(paths: Sequence[Path], column: str | None = None, **options: Any) -> Payloads:
    """Images and series from files and folders, by suffix. Raises PayloadError or OSError. column: of the series."""
    images: list[bytes] = []
    series: list[tuple[float, ...]] = []
    for path in _files(paths):
        if path.suffix.lower() in _IMAGES:
            images.append(path.read_bytes())
        else:
            series.append(_history(path, column))
    return Payloads(tuple(images), tuple(series), **options)


def _files(paths: Sequence[Path]) -> list[Path]:
    known = _IMAGES | _SERIES
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in known and file.is_file()]
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
