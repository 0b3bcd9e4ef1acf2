"""How urgent a request is, and the metadata key that carries it, known before the request is parsed."""

from __future__ import annotations

from enum import IntEnum

PRIORITY_KEY = "rafaga-priority"
"""Its values are the names below in lower case; without it a request is `normal`."""


class Priority(IntEnum):
    """The numbers are Triton's: 1 is the most urgent."""

    HIGH = 1
    NORMAL = 2
    LOW = 3

    @property
    def word(self) -> str:
        """Its value in metadata."""
        return self.name.lower()

    @classmethod
    def of(cls, word: str) -> Priority:
        """The one of that `word`. Raises ValueError."""
        for priority in cls:
            if priority.word == word:
                return priority
        raise ValueError(f"expected {', '.join(priority.word for priority in cls)}, got {word[:20]!r}")
