"""The project's documents as tests read them: files to save, and commands to run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r'^```(\w*)(?: title="([^"\n]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """`title`: the file that the reader saves it as, or ""."""

    language: str
    title: str
    text: str

    @property
    def lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]


def blocks(document: str, language: str | None = None) -> list[Block]:
    """Fenced blocks of a document below the checkout, in order; of one language ("" for none) or of all."""
    found = (Block(*parts) for parts in _BLOCK.findall((ROOT / document).read_text()))
    return [block for block in found if language is None or block.language == language]


def commands(document: str, language: str = "sh") -> list[str]:
    return [line for block in blocks(document, language) for line in block.lines]


def transcript(document: str) -> list[tuple[str, str]]:
    """Commands of the blocks that show a terminal, each with what it prints."""
    text = "".join(block.text for block in blocks(document, "console"))
    parts = (part.split("\n", 1) for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:])
    return [(command, output) for command, output in parts]


_NUMBER = re.compile(r"\d+\.\d+(?:e-?\d+)?")
_TIMES = re.compile(r'"timing":\{[^}]*\}')


def same_output(found: str, shown: str) -> bool:
    """Whether they differ only in times, and in the last digits of numbers, which depend on the processor."""
    texts = [_TIMES.sub("", text).rstrip() for text in (found, shown)]
    numbers = [[float(number) for number in _NUMBER.findall(text)] for text in texts]
    words = [_NUMBER.sub("#", text).split() for text in texts]
    return words[0] == words[1] and numbers[0] == pytest.approx(numbers[1], rel=0.01, abs=0.001)
