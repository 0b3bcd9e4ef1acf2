"""A verdict says what the figures say."""

from __future__ import annotations

import math

import pytest

from bench.verdicts import Aim, Case, Verdict

AT_LEAST = {1: Aim(1.0), 8: Aim(1.4), 32: Aim(1.6)}


def over_triton(*middles: float) -> Verdict:
    cases = (Case.of(str(n), aim, [middle]) for (n, aim), middle in zip(AT_LEAST.items(), middles, strict=True))
    return Verdict("over Triton", tuple(cases), "at {} callers")


@pytest.mark.parametrize(
    ("middles", "found"),
    [
        ((1.0, 1.4, 1.6), "reached"),
        ((1.04, 1.4, 1.22), "reached at 1 and 8 callers; **not reached** at 32: 1.22 of 1.6"),
        (
            (1.04, 1.39, 1.22),
            "reached at 1 callers; **not reached** at 8: 1.39 of 1.4, at 32: 1.22 of 1.6",
        ),
        (
            (0.9, 1.0, 1.2),
            "**not reached** at 1: 0.90 of 1, at 8: 1.00 of 1.4, at 32: 1.20 of 1.6",
        ),
    ],
)
def test_cases_that_reach_and_miss_are_named(middles: tuple[float, ...], found: str) -> None:
    assert over_triton(*middles).found() == found
    assert over_triton(*middles).reached is (found == "reached")


def test_a_single_case_needs_no_place() -> None:
    assert Verdict("int8", (Case.of("", Aim(2.5), [2.2, 2.4, 2.6]),)).found() == "**not reached**: 2.40 of 2.5"
    assert Verdict("int8", (Case.of("", Aim(3.0, at_least=False), [4.0]),)).found() == (
        "**not reached**: 4.00 of at most 3"
    )
    assert Verdict("int8", ()).found() == "not measured"


def test_the_median_decides_and_the_range_is_shown() -> None:
    case = Case.of("", Aim(1.4), [1.2, 1.5, 1.45])
    assert case.reached
    assert case.measured() == "1.45 (1.20–1.50)"


def test_the_figure_of_all_blocks_together_goes_before_their_median() -> None:
    case = Case.of("", Aim(1.5, at_least=False), [1.0, 1.1, 1.2], 1.6)
    assert not case.reached
    assert case.measured() == "1.60 (1.00–1.20)"


@pytest.mark.parametrize(("value", "shown"), [(1.396, "1.396"), (1.3999, "1.3999"), (1.404, "1.40"), (1.4, "1.40")])
def test_no_rounding_to_the_other_side_of_the_bound(value: float, shown: str) -> None:
    assert Case.of("", Aim(1.4), [value]).shown() == shown


def test_no_answer_reaches_nothing() -> None:
    """1. Of no block. 2. Of some: the others count."""
    case = Case.of("2×", Aim(1.5, at_least=False), [math.nan, math.nan])
    assert not case.reached
    assert case.measured() == "no answer"
    assert Case.of("2×", Aim(1.5, at_least=False), [math.nan, 1.0]).reached
