"""Where tests find data that the project does not contain."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def data_root(inside: str) -> Path:
    """The folder that holds `inside`; skips the test, saying what is missing, where there is none."""
    root = Path(os.environ.get("RAFAGA_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (root / inside).exists():
        pytest.skip(f"needs {inside}: name a folder that has it with RAFAGA_DATA")
    return root
