"""What is sent: files of the user's, or random pixels and series of a shape the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def read(paths: Sequence[Path], **options: Any) -> Payloads:
    """Images and series from files and folders, by suffix. Raises PayloadError or OSError."""
    images: list[bytes] = []
    series: list[tuple[float, ...]] = []
    for path in _files(paths):
        if path.suffix.lower() in _IMAGES:
            images.append(path.read_bytes())
        else:
            series.append(_history(path))
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


def _history(path: Path) -> tuple[float, ...]:
    """The last column of a CSV file with or without a header, or one number per line."""
    cells = [line.split(",")[-1].strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    try:
        return tuple(float(cell) for cell in (cells if _is_number(cells[0]) else cells[1:]))
    except (ValueError, IndexError) as error:
        raise PayloadError(f"{path}: expected numbers, in the last column of each line: {error}") from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
