"""Devices, versions of models, and values of single models, as settings name them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rafaga.server.config.device import CPU, Device, DeviceKind, parse
from rafaga.server.config.model_versions import parse_versions
from rafaga.server.config.per_model import PerModel
from rafaga.server.config.readers import words


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["auto"], None),
        (["cpu"], (CPU,)),
        (["cuda"], (Device(DeviceKind.CUDA, 0),)),
        (["cuda:3"], (Device(DeviceKind.CUDA, 3),)),
        (["tensorrt:1"], (Device(DeviceKind.TENSORRT, 1),)),
        (["cuda:0", "cuda:1"], (Device(DeviceKind.CUDA, 0), Device(DeviceKind.CUDA, 1))),
    ],
)
def test_devices(texts: list[str], found: tuple[Device, ...] | None) -> None:
    assert parse(texts) == found
    assert found is None or parse([str(device) for device in found]) == found


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
    ("rules", "default", "others"),
    [
        ([], 7, {}),
        (["2", "lenet5=1"], 2, {"lenet5": 1}),
        (["lenet5=1", "2", "a.b-c_d=300"], 2, {"lenet5": 1, "a.b-c_d": 300}),
        (["lenet5=1"], 7, {"lenet5": 1}),
    ],
)
def test_values_of_single_models(rules: list[str], default: int, others: dict[str, int]) -> None:
    found = PerModel.parse(rules, int, 7)
    assert found == PerModel(default, others)
    assert {name: found.of(name) for name in ("another", *others)} == {"another": default, **others}


def numbers(rules: list[str]) -> PerModel[int]:
    return PerModel.parse(rules, int, 1)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (parse, "gpu", r"'gpu': expected auto, cpu, cuda\[:N\] or tensorrt\[:N\]"),
        (parse, "cuda:", "'cuda:': expected"),
        (parse, "cuda:-1", "'cuda:-1': expected"),
        (parse, "cpu:0", "'cpu:0': expected"),
        (parse, "auto,cpu", "'auto': expected"),
        (parse, "cuda,cuda:0", "cuda:0 is listed twice"),
        (parse, "cuda:0,cpu", "cuda:0, cpu: expected devices of one kind"),
        (parse, "cuda:0,tensorrt:1", "devices of one kind"),
        (parse_versions, "newest", "expected latest, latest:N, all"),
        (parse_versions, "3", "expected latest, latest:N, all"),
        (parse_versions, "latest:0", "an integer from 1"),
        (parse_versions, "latest:", "an integer from 1"),
        (parse_versions, "latest:two", "an integer"),
        (parse_versions, "a=", "expected latest"),
        (parse_versions, "a=0", "an integer"),
        (parse_versions, "a=1000000000000000000", "at most 18 digits"),
        (parse_versions, "a=1,01", "an integer"),
        (parse_versions, "a=1,b", "expected latest"),
        (parse_versions, "a=all,3", "expected latest"),
        (parse_versions, "../a=1", "name of a model"),
        (parse_versions, "=1", "name of a model"),
        (parse_versions, "a=1,b=2,a=3", "only one value for a"),
        (parse_versions, "all,latest", "only one value for all models"),
        (numbers, "a=1,a=1", "'a=1': expected only one value for a"),
        (numbers, "=1", "'=1': expected the name of a model before '='"),
        (numbers, "A/b=1", "'A/b=1': expected the name of a model before '='"),
    ],
)
def test_invalid_values(read: Callable[[list[str]], object], text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(words(text))
