"""The catalogue as a whole, its shipped weights measured anew, and docs/accuracy.md with the figures of the records."""

from __future__ import annotations

import re
import shlex
from itertools import takewhile
from pathlib import Path

import msgspec
import pytest
import torch
from torchvision.models import get_weight

from models.entry import Corpus, ImageInput, Shipped, Torchvision
from models.expectation import shortfalls
from models.loading import load_weights
from models.progress import SILENT
from models.training import __main__ as training
from models.training import coverage
from models.training.data import Series, load_co2, load_etth1, load_mnist, load_sp500
from models.training.forecast_eval import Inputs, evaluate, held_out, quantiles_of
from models.training.images import prepare
from models.training.recipes import recipes
from models.training.run import TrainingRecord
from models.training.series import ForecastingProblem
from models.training.significance import compare
from models.zoo import catalogue
from rafaga.bundle import NAME_PATTERN, ForecastSpec, Metric, SequenceSpec, Task, sha256_of
from tests.documents import ROOT
from tests.models.support import data_root

ENTRIES = catalogue()
SHIPPED = {name: e for name, e in ENTRIES.items() if isinstance(e.weights, Shipped) and e.weights.path.exists()}
FORECASTERS = [name for name, entry in SHIPPED.items() if isinstance(entry.input, ForecastSpec)]
TRAINED_ON_DEMAND = {"plain20-cifar10", "resnet56-cifar10", "plain56-cifar10"}
PAGE = (ROOT / "docs" / "accuracy.md").read_text()


def record_of(name: str) -> TrainingRecord:
    weights = ENTRIES[name].weights
    assert isinstance(weights, Shipped)
    return msgspec.json.decode(weights.path.with_suffix(".json").read_bytes(), type=TrainingRecord)


def recorded(name: str) -> dict[str, float]:
    return {metric.name: metric.value for metric in record_of(name).metrics}


def test_the_catalogue_is_complete() -> None:
    for entry in ENTRIES.values():
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


def test_some_weights_are_not_shipped() -> None:
    entries = {name for name, entry in ENTRIES.items() if isinstance(entry.weights, Shipped)}
    assert entries - SHIPPED.keys() == TRAINED_ON_DEMAND


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_match_their_record(name: str) -> None:
    entry, record = SHIPPED[name], record_of(name)
    assert isinstance(entry.weights, Shipped)
    assert (record.name, record.architecture, record.dataset) == (name, entry.architecture, entry.dataset)
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
    found = shortfalls(ENTRIES[model], [Metric(name=name, value=value, dataset="photos", samples=100)])
    assert [str(s) for s in found] == ([message] if message else [])


def table(first_column: str, heading: str) -> dict[str, list[str]]:
    """Cells by the first of each row, of the table under `heading` that begins with `first_column`."""
    lines = iter(PAGE.split(f"# {heading}\n")[1].splitlines())
    next(line for line in lines if line.startswith(f"| {first_column}".rstrip()))
    next(lines)  # the rule
    rows = ([cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in takewhile(str.strip, lines))
    return {name: cells for name, *cells in rows}


def test_every_shipped_network_is_listed_with_its_command_and_figures() -> None:
    found = {
        shlex.split(command)[3]: (command, cells[0]) for command, cells in table("command", "Trained weights").items()
    }
    assert set(found) == set(SHIPPED)
    for name, (command, figure) in found.items():
        assert command == record_of(name).command
        options = training.new_parser().parse_args(shlex.split(command)[3:])
        assert (options.epochs, options.seed) == (recipes()[name].schedule.epochs, 0), "the recipe's defaults"
        scale = 1 if name in FORECASTERS else 100
        noted = [value for key, value in recorded(name).items() if not key.startswith(("coverage", "pinball"))]
        figures = [f"{scale * value:.2f}" for value in noted]
        assert re.findall(r"\d+\.\d+", figure) == figures, name


def test_coverage_is_what_is_recorded() -> None:
    intervals = table("", "Forecasters: coverage of intervals")
    quantiles = table("", "Coverage of each quantile")
    assert set(intervals) == set(quantiles) == set(FORECASTERS)
    for name in FORECASTERS:
        noted = recorded(name)
        held = [noted.get(f"coverage_{percent}") for percent in (90, 80, 50)]
        assert intervals[name] == ["not given" if share is None else f"{100 * share:.1f}" for share in held]
        points = [
            None if (share := noted.get(f"coverage_q{percent:02d}")) is None else 100 * share - percent
            for percent in (5, 10, 25, 50, 75, 90, 95)
        ]
        given = [p for p in points if p is not None]
        within = f"{sum(abs(p) <= 5 for p in given)} of {len(given)}"
        assert quantiles[name] == [*("" if p is None else f"{p:+.1f}" for p in points), within], name


def series_of(corpus: Corpus | None) -> Series:
    if corpus is Corpus.CO2:
        return load_co2()
    root = data_root("timeseries")
    return load_etth1(root) if corpus is Corpus.ETTH1 else load_sp500(root)


@pytest.mark.parametrize("name", FORECASTERS)
def test_forecasters_reach_what_is_recorded(name: str) -> None:
    entry = SHIPPED[name]
    assert isinstance(entry.input, ForecastSpec)
    module = entry.build().eval()
    load_weights(entry, module)

    def forecast(inputs: Inputs) -> Series:
        with torch.inference_mode():
            answer: Series = module(*map(torch.from_numpy, inputs.values())).numpy()
        return answer

    origins = held_out([series_of(entry.corpus)], entry.input)
    measured = evaluate(origins, entry.input, quantiles_of(forecast, origins), entry.dataset)
    noted = {metric.name: metric for metric in record_of(name).metrics}
    for metric in measured:
        assert metric.value == pytest.approx(noted[metric.name].value, abs=2e-3), metric.name
        assert metric.standard_error == pytest.approx(noted[metric.name].standard_error, rel=0.05, abs=1e-3)
        assert metric.standard_error > 0 or metric.value in (0, 1), "every origin has the same share"
    for baseline in ("mase_seasonal_naive", "mase_holt_winters"):
        assert noted["mase"].value < noted[baseline].value


@pytest.mark.parametrize("name", FORECASTERS)
def test_intervals_hold_their_share_or_the_calibration_shows_why_not(name: str) -> None:
    """Within five points of it, or within the transfer error, computed again here."""
    entry = SHIPPED[name]
    problem = recipes()[name].problem(None if entry.corpus is Corpus.CO2 else data_root("timeseries"), SILENT)
    assert isinstance(problem, ForecastingProblem)
    load_weights(entry, problem.module)
    problem.module.eval()
    transfer = problem.transfer()
    record = record_of(name)
    if record.calibration is not None:  # lstm-co2 was trained before it was recorded
        assert record.calibration.transfer == pytest.approx(transfer, abs=2e-3)
    found = {metric.name: metric.value for metric in record.metrics}
    nominals = {"coverage_90": 0.9, "coverage_80": 0.8, "coverage_50": 0.5}
    for figure in nominals.keys() & found.keys():
        assert abs(found[figure] - nominals[figure]) < max(0.05, transfer[figure]), figure


@pytest.mark.nightly
def test_the_ett_forecaster_is_better_than_holt_winters() -> None:
    found = {c.baseline.metric: c for c in compare("lstm-ett", data_root("timeseries"))}
    holt_winters = found["mase_holt_winters"]
    assert holt_winters.difference < 0
    assert holt_winters.baseline_error == pytest.approx(recorded("lstm-ett")["mase_holt_winters"], abs=2e-3)


@pytest.mark.nightly
def test_the_sp500_forecaster_is_as_good_as_a_random_walk_with_drift() -> None:
    found = {c.baseline.name: c for c in compare("lstm-sp500", data_root("timeseries"))}
    with_drift = found["random walk with drift"]
    assert abs(with_drift.difference) < with_drift.standard_error
    assert found["seasonal naive"].difference < 0
    assert found["seasonal naive"].model_error == pytest.approx(recorded("lstm-sp500")["mase"], abs=2e-3)


def test_the_coverage_command_prints_what_is_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    """Of CO2, which needs no data: name, figure, nominal and found share."""
    assert coverage.main(["rnn-co2"]) == 0
    lines = [re.findall(r"[\w.%+-]+", line) for line in capsys.readouterr().out.splitlines()]
    found = {words[1]: float(words[4]) for words in lines if words[:1] == ["rnn-co2"]}
    noted = {name: value for name, value in recorded("rnn-co2").items() if name.startswith("coverage")}
    assert found == pytest.approx({name: 100 * value for name, value in noted.items()}, abs=0.3)


@pytest.mark.parametrize("name", ["lenet5-mnist", pytest.param("cnn-mnist", marks=pytest.mark.nightly)])
def test_digits_are_classified_as_well_as_recorded(name: str) -> None:
    images, labels = load_mnist(data_root("mnist"), train=False)
    entry = SHIPPED[name]
    assert isinstance(entry.input, ImageInput)
    module = entry.build().eval()
    load_weights(entry, module)
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(labels), 1000):
            chosen = slice(start, start + 1000)
            logits = module(prepare(torch.from_numpy(images[chosen].copy()), entry.input))
            correct += int((logits.argmax(1) == torch.from_numpy(labels[chosen])).sum())
    assert correct / len(labels) == pytest.approx(recorded(name)["top1"], abs=2e-4)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["lstm-reber", "lstm-co2"])
def test_the_recorded_command_trains_the_same_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that need no extra data and take minutes. The last bits may differ between processors."""
    monkeypatch.chdir(tmp_path)
    noted = record_of(name)
    arguments = [*shlex.split(noted.command)[3:], "--device", "cpu", "--output", "again.safetensors"]
    assert training.main(arguments) == 0
    again = msgspec.json.decode((tmp_path / "again.json").read_bytes(), type=TrainingRecord)
    assert again.command == noted.command
    for found, shipped in zip(again.metrics, noted.metrics, strict=True):
        assert (found.name, found.dataset, found.samples) == (shipped.name, shipped.dataset, shipped.samples)
        assert found.value == pytest.approx(shipped.value, rel=0.05), found.name
