"""The catalogue as a whole, and docs/accuracy.md: its figures are those of the records."""

from __future__ import annotations

import json
import re
import shlex
from itertools import takewhile

import msgspec
import pytest
from torchvision.models import get_weight

from models.entry import Entry, ImageInput, Shipped, Torchvision
from models.expectation import shortfalls
from models.training import __main__ as training
from models.training.recipes import recipes
from models.training.run import TrainingRecord
from models.zoo import catalogue
from rafaga.bundle import NAME_PATTERN, ForecastSpec, Metric, SequenceSpec, Task, sha256_of
from tests.documents import ROOT

ENTRIES = list(catalogue().values())
TRAINED_ON_DEMAND = {"plain20-cifar10", "resnet56-cifar10", "plain56-cifar10"}


def test_the_catalogue_is_complete() -> None:
    for entry in ENTRIES:
        assert NAME_PATTERN.fullmatch(entry.name)
        assert isinstance(entry.input, ForecastSpec) == (entry.task is Task.FORECASTING), entry.name
        assert isinstance(entry.input, SequenceSpec) == (entry.task is Task.SEQUENCE), entry.name
        assert bool(entry.labels()) == (entry.task not in (Task.FEATURES, Task.FORECASTING)), entry.name
        assert (entry.detection is not None) == (entry.task is Task.DETECTION), entry.name
        assert bool(entry.strides) == (entry.task is Task.FEATURES), entry.name
        assert bool(entry.expected) != bool(entry.unpromised), entry.name
        if isinstance(entry.input, ImageInput):
            assert len(entry.input.mean) == len(entry.input.std) == entry.input.channels, entry.name
        if isinstance(entry.weights, Torchvision):
            weights = get_weight(entry.weights.member)
            if entry.labels():
                assert entry.labels() == tuple(weights.meta["categories"])
            if entry.task is Task.CLASSIFICATION:
                assert entry.expected["top1"] == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100


@pytest.mark.parametrize("entry", [e for e in ENTRIES if isinstance(e.weights, Shipped)], ids=lambda e: e.name)
def test_shipped_weights_match_their_record(entry: Entry) -> None:
    assert isinstance(entry.weights, Shipped)
    if entry.name in TRAINED_ON_DEMAND:
        assert not entry.weights.path.exists()
        return
    record = msgspec.json.decode(entry.weights.path.with_suffix(".json").read_bytes(), type=TrainingRecord)
    assert (record.name, record.architecture, record.dataset) == (entry.name, entry.architecture, entry.dataset)
    assert record.sha256 == sha256_of(entry.weights.path)
    assert record.parameters == sum(p.numel() for p in entry.build().parameters())
    assert not list(shortfalls(entry, record.metrics))
    assert set(entry.expected) <= {metric.name for metric in record.metrics}


@pytest.mark.parametrize(
    ("model", "name", "value", "message"),
    [
        ("resnet50", "top1", 0.81, None),
        ("resnet50", "similarity", 0.1, None),
        ("resnet50", "top1", 0.8, "top1 0.8000 ± 0.0400 on 100 samples of photos; expected at least 0.8086"),
        ("lstm-ett", "mase", 0.99, None),
        ("lstm-ett", "mase", 1.0, "mase 1.0000 on 100 samples of photos; expected below 1.0000"),
    ],
)
def test_shortfalls_compare_figures_with_the_expected(model: str, name: str, value: float, message: str | None) -> None:
    found = shortfalls(catalogue()[model], [Metric(name=name, value=value, dataset="photos", samples=100)])
    assert [str(s) for s in found] == ([message] if message else [])


PAGE = (ROOT / "docs" / "accuracy.md").read_text()
SHIPPED = {
    n: e.weights.path for n, e in catalogue().items() if isinstance(e.weights, Shipped) and e.weights.path.exists()
}
FORECASTERS = {n for n in SHIPPED if isinstance(catalogue()[n].input, ForecastSpec)}


def table(first_column: str, heading: str) -> dict[str, list[str]]:
    """Cells by the first of each row, of the table under `heading` that begins with `first_column`."""
    lines = iter(PAGE.split(f"# {heading}\n")[1].splitlines())
    next(line for line in lines if line.startswith(f"| {first_column}".rstrip()))
    next(lines)  # the rule
    rows = ([cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in takewhile(str.strip, lines))
    return {name: cells for name, *cells in rows}


def recorded(name: str) -> tuple[str, dict[str, float]]:
    """The command that made the shipped weights, and their figures."""
    record = json.loads(SHIPPED[name].with_suffix(".json").read_text())
    return record["command"], {m["name"]: m["value"] for m in record["metrics"]}


def test_every_shipped_network_is_listed_with_its_command_and_figures() -> None:
    found = {
        shlex.split(command)[3]: (command, cells[0]) for command, cells in table("command", "Trained weights").items()
    }
    assert set(found) == set(SHIPPED)
    for name, (command, figure) in found.items():
        noted_command, noted = recorded(name)
        assert command == noted_command
        options = training.new_parser().parse_args(shlex.split(command)[3:])
        assert (options.epochs, options.seed) == (recipes()[name].schedule.epochs, 0), "the recipe's defaults"
        scale = 1 if name in FORECASTERS else 100
        figures = [f"{scale * v:.2f}" for key, v in noted.items() if not key.startswith(("coverage", "pinball"))]
        assert re.findall(r"\d+\.\d+", figure) == figures, name


def test_coverage_is_what_is_recorded() -> None:
    intervals = table("", "Forecasters: coverage of intervals")
    quantiles = table("", "Coverage of each quantile")
    assert set(intervals) == set(quantiles) == FORECASTERS
    for name in FORECASTERS:
        _, noted = recorded(name)
        held = [noted.get(f"coverage_{percent}") for percent in (90, 80, 50)]
        assert intervals[name] == ["not given" if share is None else f"{100 * share:.1f}" for share in held]
        points = [
            None if (share := noted.get(f"coverage_q{percent:02d}")) is None else 100 * share - percent
            for percent in (5, 10, 25, 50, 75, 90, 95)
        ]
        given = [p for p in points if p is not None]
        within = f"{sum(abs(p) <= 5 for p in given)} of {len(given)}"
        assert quantiles[name] == [*("" if p is None else f"{p:+.1f}" for p in points), within], name
