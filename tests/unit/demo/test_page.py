"""The demonstration's plain-text output."""

from __future__ import annotations

import numpy as np
import pytest

from demo.page import Page, bars, drawings


def test_bars_are_in_proportion() -> None:
    assert bars([("1 rows", 40, "a"), ("2-3 rows", 10, "b"), ("4 rows", 0, "c")]).splitlines() == [
        "  1 rows  " + "█" * 40 + "  a",
        "2-3 rows  " + "█" * 10 + " " * 30 + "  b",
        "  4 rows  " + " " * 40 + "  c",
    ]
    assert bars([]) == ""


def test_digits_are_drawn_side_by_side() -> None:
    image = np.array([[0, 255], [0, 0], [64, 128], [0, 0]], np.uint8)
    assert drawings(np.stack([image, image]), ["is 1", "is 2"]).splitlines() == [
        "is 1   is 2",
        " #      #",
        ".:     .:",
    ]


def test_sections_number_themselves_and_failures_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    page = Page()
    page.section("Export")
    page.section("Serve")
    page.failure("the disk is full")
    captured = capsys.readouterr()
    assert captured.out == "\n1. Export\n---------\n\n2. Serve\n--------\n"
    assert captured.err == "\nFAILED: the disk is full\n"
