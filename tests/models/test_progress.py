"""Progress: one changing line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from models.progress import SpinnerSteps, shown


def test_a_step_is_shown_with_how_much_of_it_is_done() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(8), TaskProgressColumn())
    progress = Progress(*columns, console=console)

    def line() -> str:
        with console.capture() as captured:
            console.print(progress.get_renderable())
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", captured.get()).strip()

    steps = SpinnerSteps(progress, "resnet20")
    assert line().startswith("resnet20 ")
    steps.step("calibrating [int8]")  # brackets are not markup
    assert line().startswith("resnet20: calibrating [int8] ")
    assert "%" not in line(), "the total is not known yet"
    steps.advance(3, 12)
    assert line().endswith("25%")
    steps.step("measuring")
    assert line().startswith("resnet20: measuring ")
    assert "%" not in line(), "every step starts at zero"
    steps.close()
    assert line() == ""


def test_without_a_terminal_every_step_is_a_line() -> None:
    written = io.StringIO()
    with shown(Console(file=written, width=100), "resnet20") as steps:
        steps.step("calibrating [int8]")
        steps.advance(1, 2)
        steps.step("measuring")
    assert written.getvalue() == "resnet20: calibrating [int8]\nresnet20: measuring\n"
