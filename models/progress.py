"""Progress on the terminal while a model is trained, measured or exported.

A spinner with the current step, and a bar if the amount of work is known. Works without torch, for `verify`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn


class Steps(Protocol):
    """Receives the progress of the work."""

    def step(self, what: str) -> None:
        """The next step begins; its amount of work is not known yet."""

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` parts of this step are finished."""


class Silent:
    """Shows nothing."""

    def step(self, what: str) -> None:
        pass

    def advance(self, done: int, total: int) -> None:
        pass


SILENT = Silent()


class SpinnerSteps:
    """One line on the terminal. Without a terminal, each step is a plain line."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._title = title
        self._task = progress.add_task(title, total=None)

    def step(self, what: str) -> None:
        if self._progress.console.is_terminal:
            # Not reset(): it keeps the previous step's total, and the new step would show 0 %.
            self._progress.remove_task(self._task)
            self._task = self._progress.add_task(f"{self._title}: {what}", total=None)
        else:
            self._progress.console.print(f"{self._title}: {what}", highlight=False, markup=False)

    def advance(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def close(self) -> None:
        self._progress.remove_task(self._task)


@contextmanager
def shown(console: Console, title: str) -> Iterator[Steps]:
    """Shows the steps of one task, e.g. of one model, until the block ends."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        steps = SpinnerSteps(progress, title)
        try:
            yield steps
        finally:
            steps.close()
