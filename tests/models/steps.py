"""Progress as the code under test reports it."""

from __future__ import annotations


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
