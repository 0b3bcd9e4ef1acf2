"""The search for the highest rate, against servers with a sharp limit."""

from __future__ import annotations

import pytest

from rafaga.load.search import search


def run(first: float, limit: float, precision: float = 0.05) -> tuple[float, list[float]]:
    searching = search(first, precision)
    tried = [next(searching)]
    while True:
        try:
            tried.append(searching.send(tried[-1] <= limit))
        except StopIteration as done:
            return done.value, tried


@pytest.mark.parametrize("first", [10, 80, 100, 101, 170, 3000])
@pytest.mark.parametrize("precision", [0.05, 0.01])
def test_it_ends_just_below_the_limit(first: float, precision: float) -> None:
    found, tried = run(first, limit=100, precision=precision)
    assert 100 / (1 + precision) <= found <= 100
    assert found in tried
    assert len(tried) < 16
    assert len(set(tried)) == len(tried), "no rate is measured twice"


def test_a_server_that_meets_nothing_has_no_rate() -> None:
    found, tried = run(100, limit=0)
    assert found == 0
    assert tried[0] == 100
    assert tried[-1] < 1


def test_a_first_guess_that_is_far_too_low_gives_what_was_seen() -> None:
    found, tried = run(1, limit=1e9)
    assert found == max(tried) == 128
