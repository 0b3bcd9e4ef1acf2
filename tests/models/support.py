"""Data that the project does not contain, and progress as the code under test reports it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def data_root(inside: str) -> Path:
    """The folder that holds `inside`; skips the test, saying what is missing, where there is none."""
    root = Path(os.environ.get("RAFAGA_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (root / inside).exists():
        pytest.skip(f"needs {inside}: name a folder that has it with RAFAGA_DATA")
    return root


class RecordedSteps:
    """`progress`: (done, total) as last reported, by step. Fails the test when progress goes backwards."""

    def __init__(self) -> None:
        self.progress: dict[str, tuple[int, int]] = {}

    def step(self, what: str) -> None:
        self.progress[what] = (0, 0)

    def advance(self, done: int, total: int) -> None:
        what = next(reversed(self.progress))
        assert self.progress[what][0] <= done <= total
        self.progress[what] = (done, total)
