"""Devices, versions of models, and values of single models, as settings name them."""

from __future__ import annotations

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
def test_names(texts: list[str], found: tuple[Device, ...] | None) -> None:
    assert parse(texts) == found


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["gpu"], r"'gpu': expected auto, cpu, cuda\[:N\] or tensorrt\[:N\]"),
        (["cuda:"], "'cuda:': expected"),
        (["cuda:-1"], "'cuda:-1': expected"),
        (["cpu:0"], "'cpu:0': expected"),
        (["auto", "cpu"], "'auto': expected"),
        ([], "got nothing"),
        (["cuda", "cuda:0"], "cuda:0 is listed twice"),
        (["cuda:0", "cpu"], "cuda:0, cpu: expected devices of one kind"),
        (["cuda:0", "tensorrt:1"], "devices of one kind"),
    ],
)
def test_invalid_names(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(texts)


@pytest.mark.parametrize("text", ["cpu", "cuda:0", "tensorrt:2"])
def test_a_device_is_written_as_it_is_read(text: str) -> None:
    assert [str(device) for device in parse([text]) or ()] == [text]


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
def test_invalid_values_of_single_models(rules: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerModel.parse(rules, int, 1)
