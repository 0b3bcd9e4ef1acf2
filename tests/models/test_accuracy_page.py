"""docs/accuracy.md: every figure of a trained network is what its record says, and comes from a command that exists."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile

import pytest

from models.entry import ImageInput, SeriesInput, Shipped, Torchvision
from models.training import __main__ as training
from models.training import coverage, degradation, significance
from models.training.recipes import recipes
from models.zoo import catalogue
from tests.documents import ROOT

PAGE = (ROOT / "docs" / "accuracy.md").read_text()
SHIPPED = {
    n: e.weights.path for n, e in catalogue().items() if isinstance(e.weights, Shipped) and e.weights.path.exists()
}
COMMANDS = [shlex.split(c) for c in re.findall(r"`(python -m models\.training[^`]*)`", " ".join(PAGE.split()))]


def table(first_column: str, heading: str) -> Iterator[list[str]]:
    """Cells of the rows of the table under `heading` that begins with `first_column`."""
    lines = iter(PAGE.split(f"# {heading}\n")[1].splitlines())
    next(line for line in lines if line.startswith(f"| {first_column}".rstrip()))
    next(lines)  # the rule
    for line in takewhile(lambda line: line.startswith("|"), lines):
        yield [cell.strip().strip("`") for cell in line.strip("|").split("|")]


def recorded(name: str) -> tuple[str, dict[str, float]]:
    """The command that made the shipped weights, and their figures."""
    record = json.loads(SHIPPED[name].with_suffix(".json").read_text())
    return record["command"], {m["name"]: m["value"] for m in record["metrics"]}


def test_every_shipped_network_is_in_the_table_with_its_command_and_its_figures() -> None:
    found = {shlex.split(command)[3]: (command, figure) for command, figure, _ in table("command", "Trained weights")}
    assert set(found) == set(SHIPPED)
    for name, (command, figure) in found.items():
        noted_command, noted = recorded(name)
        assert command == noted_command
        spread = {key for key in noted if key.startswith(("coverage", "pinball"))}
        scale = 1 if isinstance(catalogue()[name].input, SeriesInput) else 100
        figures = [f"{scale * value:.2f}" for key, value in noted.items() if key not in spread]
        assert re.findall(r"\d+\.\d+", figure) == figures, name


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_can_be_given(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    module, arguments = words[2], words[3:]
    if module != "models.training":
        command = {m.__name__: m for m in (coverage, degradation, significance)}[module]
        with pytest.raises(SystemExit) as stopped:
            command.main([*arguments, "--help"])
        assert stopped.value.code == 0
        assert module in capsys.readouterr().out
        return
    options = training.new_parser().parse_args(arguments)
    if options.name != "NAME":
        assert recipes()[options.name].schedule.epochs == options.epochs


def test_a_recipe_trains_as_it_did_unless_told_otherwise() -> None:
    for name in SHIPPED:
        command, _ = recorded(name)
        options = training.new_parser().parse_args(shlex.split(command)[3:])
        assert (options.epochs, options.seed) == (recipes()[name].schedule.epochs, 0)


def test_coverage_is_what_is_recorded() -> None:
    rows = list(table("", "Forecasters: do intervals hold what they say?"))
    assert {name for name, *_ in rows} == {n for n in SHIPPED if isinstance(catalogue()[n].input, SeriesInput)}
    for name, *shares in rows:
        _, noted = recorded(name)
        assert shares == [f"{100 * noted[f'coverage_{percent}']:.1f}" for percent in (90, 80, 50)]


def test_coverage_of_each_quantile_is_what_is_recorded() -> None:
    rows = list(table("", "And each quantile?"))
    assert {name for name, *_ in rows} == {n for n in SHIPPED if isinstance(catalogue()[n].input, SeriesInput)}
    for name, *missed, within in rows:
        _, noted = recorded(name)
        points = [100 * noted[f"coverage_q{percent:02d}"] - percent for percent in (5, 10, 25, 50, 75, 90, 95)]
        assert missed == [f"{p:+.1f}" for p in points], name
        assert within == f"{sum(abs(p) <= 5 for p in points)} of 7", name


def test_losses_start_from_what_is_recorded() -> None:
    rows = {name: cells for name, *cells in table("NAME", "What trained networks lose")}
    for name, (_, full, _, int8, lost, _) in rows.items():
        assert float(lost) == pytest.approx(float(full) - float(int8), abs=1e-9)
        if name in SHIPPED:
            _, noted = recorded(name)
            assert full == f"{100 * noted['top1']:.2f}"
    assert rows.keys() >= {n for n, e in catalogue().items() if n in SHIPPED and isinstance(e.input, ImageInput)}


def test_published_errors_are_those_of_the_weights() -> None:
    from torchvision.models import get_weight

    classifiers = {
        name: entry.weights.member
        for name, entry in catalogue().items()
        if isinstance(entry.weights, Torchvision) and "top1" in entry.expected
    }
    rows = {name: cells for name, *cells in table("NAME", "Published weights")}
    assert {name: member for name, (member, *_) in rows.items()} == classifiers
    for member, *errors in rows.values():
        figures = get_weight(member).meta["_metrics"]["ImageNet-1K"]
        assert errors == [f"{100 - figures[key]:.2f} %" for key in ("acc@1", "acc@5")]


@pytest.mark.parametrize("name", ["fcn-resnet50", "ssd300-vgg16", "fasterrcnn-resnet50-fpn"])
def test_published_figures_of_detectors_and_the_segmenter_are_told(name: str) -> None:
    told = " ".join(PAGE.split()).partition(f"`{name}`")[2]
    figures = [float(figure) for figure in re.findall(r"(\d+\.\d) %", told)]
    expected = [round(100 * value, 1) for value in catalogue()[name].expected.values()]
    assert figures[: len(expected)] == expected


def test_the_errors_of_the_papers_are_told() -> None:
    for error in ("24.4 %", "7.1 %", "10.07 %", "6.67 %"):
        assert error in " ".join(PAGE.split())
