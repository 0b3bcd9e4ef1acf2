"""What a person sees: one line that changes on a screen, plain lines elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from models.progress import SpinnerSteps, shown


def on_screen(progress: Progress) -> str:
    """The line as it stands, without colours."""
    with progress.console.capture() as captured:
        progress.console.print(progress.get_renderable())
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", captured.get()).strip()


@pytest.fixture
def progress() -> Progress:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    return Progress(TextColumn("{task.description}", markup=False), BarColumn(8), TaskProgressColumn(), console=console)


def test_a_step_is_shown_with_how_much_of_it_is_done(progress: Progress) -> None:
    steps = SpinnerSteps(progress, "resnet20")
    assert on_screen(progress).startswith("resnet20 ")
    steps.step("calibrating [int8]")
    assert on_screen(progress).startswith("resnet20: calibrating [int8] "), "brackets are no markup"
    assert "%" not in on_screen(progress), "how much there is to do is not known"
    steps.advance(3, 12)
    assert on_screen(progress).endswith("25%")
    steps.advance(12, 12)
    assert on_screen(progress).endswith("100%")
    steps.step("measuring")
    assert on_screen(progress).startswith("resnet20: measuring ")
    assert "%" not in on_screen(progress), "the next step begins anew"
    steps.close()
    assert on_screen(progress) == ""


def test_where_there_is_no_screen_every_step_is_a_line() -> None:
    written = io.StringIO()
    with shown(Console(file=written, width=100), "resnet20") as steps:
        steps.step("calibrating [int8]")
        steps.advance(1, 2)
        steps.advance(2, 2)
        steps.step("measuring")
    assert written.getvalue() == "resnet20: calibrating [int8]\nresnet20: measuring\n"


def test_nothing_is_left_on_the_screen() -> None:
    """Also where the work fails: the line goes, and the cursor comes back."""
    written = io.StringIO()

    def work() -> None:
        with shown(Console(file=written, force_terminal=True, width=60), "x") as steps:
            steps.step("dividing")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    hide, show, erase = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"
    assert written.getvalue().count(hide) == written.getvalue().count(show) == 1
    assert "x: dividing" in written.getvalue()
    assert written.getvalue().rpartition(erase)[2].strip() == show, "the line is erased last"
