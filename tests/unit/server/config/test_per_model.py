"""`2,lenet5=1`: a value for all models, and others for some by name."""

from __future__ import annotations

import pytest

from rafaga.server.config.per_model import PerModel, at_least_one, at_least_one_or_auto, on_off_or_auto


@pytest.mark.parametrize(
    ("rules", "default", "others"),
    [
        ([], 7, {}),
        (["2"], 2, {}),
        (["2", "lenet5=1"], 2, {"lenet5": 1}),
        (["lenet5=1", "2", "a.b-c_d=300"], 2, {"lenet5": 1, "a.b-c_d": 300}),
        (["lenet5=1"], 7, {"lenet5": 1}),
    ],
)
def test_rules(rules: list[str], default: int, others: dict[str, int]) -> None:
    found = PerModel.parse(rules, at_least_one, 7)
    assert found == PerModel(default, others)
    assert found.of("another") == default
    assert {name: found.of(name) for name in others} == others


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (["1", "2"], "expected one value for all models, got another: '2'"),
        (["a=1", "a=1"], "expected one value for a, got another: 'a=1'"),
        (["=1"], "expected the name of a model before '=', got ''"),
        (["A/b=1"], "expected the name of a model before '=', got 'A/b'"),
        (["a="], "expected a whole number from 1 on, got ''"),
        (["0"], "expected a whole number from 1 on, got '0'"),
        (["-1"], "expected a whole number from 1 on, got '-1'"),
        (["²"], "expected a whole number from 1 on, got '²'"),
        (["1" * 5000], "expected a whole number from 1 on, got '1{20}'"),
    ],
)
def test_mistakes_are_named(rules: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PerModel.parse(rules, at_least_one, 1)


def test_auto() -> None:
    assert (at_least_one_or_auto("auto"), at_least_one_or_auto("3")) == (None, 3)
    assert [on_off_or_auto(text) for text in ("auto", "on", "true", "off", "false")] == [None, True, True, False, False]
    with pytest.raises(ValueError, match="expected auto, on or off, got 'yes'"):
        on_off_or_auto("yes")
