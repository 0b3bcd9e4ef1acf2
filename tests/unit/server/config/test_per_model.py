"""`2,lenet5=1`: one value for all models, and other values for single models."""

from __future__ import annotations

import pytest

from rafaga.server.config.per_model import PerModel


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
    found = PerModel.parse(rules, int, 7)
    assert found == PerModel(default, others)
    assert found.of("another") == default
    assert {name: found.of(name) for name in others} == others


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["1", "2"], "'2': expected only one value for all models"),
        (["a=1", "a=1"], "'a=1': expected only one value for a"),
        (["=1"], "'=1': expected the name of a model before '='"),
        (["A/b=1"], "'A/b=1': expected the name of a model before '='"),
        (["a=many"], "many"),
    ],
)
def test_invalid_rules(rules: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerModel.parse(rules, int, 1)
