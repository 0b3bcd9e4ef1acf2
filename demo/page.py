"""Plain-text output: numbered headings, bars, and digits drawn in characters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import count

import numpy as np
import numpy.typing as npt

_SHADES = " .:+#"
_BAR_WIDTH = 40


class Page:
    """Prints to stdout and numbers the sections."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def section(self, title: str) -> None:
        heading = f"{next(self._numbers)}. {title}"
        self.line(f"\n{heading}\n{'-' * len(heading)}")

    def line(self, text: str = "") -> None:
        # Flushed, because a child process writes to the same terminal.
        print(text, flush=True)

    def failure(self, text: str) -> None:
        sys.stdout.flush()
        print(f"\nFAILED: {text}", file=sys.stderr, flush=True)


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """One line each: a label, a bar proportional to the value, a text. The longest bar has the full width."""
    longest = max((value for _, value, _ in rows), default=0) or 1
    wide = max((len(label) for label, _, _ in rows), default=0)
    return "\n".join(
        f"{label:>{wide}}  {'█' * round(_BAR_WIDTH * value / longest):{_BAR_WIDTH}}  {text}".rstrip()
        for label, value, text in rows
    )


def drawings(images: npt.NDArray[np.uint8], captions: Sequence[str], gap: int = 3) -> str:
    """uint8 [N, H, W] drawn in characters, in one row, with captions. Two pixel rows become one line of characters."""
    n, height, width = images.shape
    halved = images[:, : height // 2 * 2].reshape(n, height // 2, 2, width).max(axis=2)
    shades = np.array(list(_SHADES))[np.rint(halved / 255 * (len(_SHADES) - 1)).astype(int)]
    wide = max(width, *(len(caption) for caption in captions))
    lines = [[caption.ljust(wide) for caption in captions]]
    lines += [["".join(shades[i, row]).ljust(wide) for i in range(n)] for row in range(height // 2)]
    return "\n".join((" " * gap).join(cells).rstrip() for cells in lines)
