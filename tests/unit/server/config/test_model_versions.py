"""Which versions the setting `model_versions` selects."""

from __future__ import annotations

import pytest

from rafaga.server.config.model_versions import parse_versions
from rafaga.server.config.readers import words

THERE = [10, 2, 9, 1]


@pytest.mark.parametrize(
    ("rules", "of_a", "of_b"),
    [
        ([], [10], [10]),
        (["latest"], [10], [10]),
        (["latest:2"], [9, 10], [9, 10]),
        (["latest:7"], [1, 2, 9, 10], [1, 2, 9, 10]),
        (["all"], [1, 2, 9, 10], [1, 2, 9, 10]),
        ("a=9,2", [2, 9], [10]),
        (["a=9", "2", "b=all"], [2, 9], [1, 2, 9, 10]),
        ("a=2,b=1,9,latest:3", [2], [1, 9]),
        ("all, a=latest:2", [9, 10], [1, 2, 9, 10]),
        (["a=5"], [5], [10]),
        ("a=1700000000,999999999999999999", [1_700_000_000, 10**18 - 1], [10]),
    ],
)
def test_versions_that_are_selected(rules: str | list[str], of_a: list[int], of_b: list[int]) -> None:
    versions = parse_versions(words(rules))
    assert (versions.of("a").wanted(THERE), versions.of("b").wanted(THERE)) == (of_a, of_b)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("newest", "expected latest, latest:N, all"),
        ("3", "expected latest, latest:N, all"),
        ("latest:0", "an integer from 1"),
        ("latest:", "an integer from 1"),
        ("latest:two", "an integer"),
        ("a=", "expected latest"),
        ("a=0", "an integer"),
        ("a=1000000000000000000", "at most 18 digits"),
        ("a=1,01", "an integer"),
        ("a=1,b", "expected latest"),
        ("a=all,3", "expected latest"),
        ("../a=1", "name of a model"),
        ("=1", "name of a model"),
        ("a=1,b=2,a=3", "only one value for a"),
        ("all,latest", "only one value for all models"),
    ],
)
def test_invalid_rules(rule: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_versions(words(rule))
