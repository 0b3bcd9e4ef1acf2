"""The search for the highest rate, against servers with a sharp limit."""

from __future__ import annotations

from itertools import product

import pytest

from rafaga.load.search import search


def run(first: float, limit: float, precision: float = 0.05) -> tuple[float, list[float]]:
    searching = search(first, precision, 0.1)
    tried = [next(searching)]
    while True:
        try:
            tried.append(searching.send(tried[-1] <= limit))
        except StopIteration as done:
            return done.value, tried


@pytest.mark.parametrize(
    ("limit", "first", "precision"),
    [
        *product([100], [10, 80, 100, 101, 170, 3000], [0.05, 0.01]),
        *product([0.11, 1, 3], [200, 1_000, 50_000, 1e6], [0.05]),
    ],
)
def test_it_ends_just_below_the_limit(limit: float, first: float, precision: float) -> None:
    found, tried = run(first, limit, precision)
    assert limit / (1 + precision) <= found <= limit
    assert found in tried
    assert len(tried) < 16
    assert len(set(tried)) == len(tried), "no rate is measured twice"


def test_a_server_that_meets_nothing_has_no_rate() -> None:
    found, tried = run(100, limit=0)
    assert found == 0
    assert tried == [100, 50, 12.5, 100 / 128, 0.1], "ever further down, to the lowest"


@pytest.mark.parametrize("first", [1, 3e6])
def test_a_server_without_a_limit_ends_the_search_before_a_miss(first: float) -> None:
    found, tried = run(first, limit=1e12)
    assert found == max(tried) >= 5e5
    assert found <= max(first, 1e6)
