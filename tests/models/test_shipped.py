"""The shipped weights, measured again on data that training never saw."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import msgspec
import pytest
import torch

from models.entry import Corpus, Entry, ImageInput, Shipped
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
from rafaga.bundle import ForecastSpec
from tests.models.support import data_root

SHIPPED = {name: e for name, e in catalogue().items() if isinstance(e.weights, Shipped) and e.weights.path.exists()}


FORECASTERS = [name for name, entry in SHIPPED.items() if isinstance(entry.input, ForecastSpec)]


def record_of(entry: Entry) -> TrainingRecord:
    assert isinstance(entry.weights, Shipped)
    return msgspec.json.decode(entry.weights.path.with_suffix(".json").read_bytes(), type=TrainingRecord)


def recorded(entry: Entry) -> dict[str, float]:
    return {metric.name: metric.value for metric in record_of(entry).metrics}


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
    noted = {metric.name: metric for metric in record_of(entry).metrics}
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
    record = record_of(entry)
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
    assert holt_winters.baseline_error == pytest.approx(recorded(SHIPPED["lstm-ett"])["mase_holt_winters"], abs=2e-3)


@pytest.mark.nightly
def test_the_sp500_forecaster_is_as_good_as_a_random_walk_with_drift() -> None:
    found = {c.baseline.name: c for c in compare("lstm-sp500", data_root("timeseries"))}
    with_drift = found["random walk with drift"]
    assert abs(with_drift.difference) < with_drift.standard_error
    assert found["seasonal naive"].difference < 0
    assert found["seasonal naive"].model_error == pytest.approx(recorded(SHIPPED["lstm-sp500"])["mase"], abs=2e-3)


def test_the_coverage_command_prints_what_is_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    """Of CO2, which needs no data: name, figure, nominal and found share."""
    assert coverage.main(["rnn-co2"]) == 0
    lines = [re.findall(r"[\w.%+-]+", line) for line in capsys.readouterr().out.splitlines()]
    found = {words[1]: float(words[4]) for words in lines if words[:1] == ["rnn-co2"]}
    noted = {name: value for name, value in recorded(SHIPPED["rnn-co2"]).items() if name.startswith("coverage")}
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
    assert correct / len(labels) == pytest.approx(recorded(entry)["top1"], abs=2e-4)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["lstm-reber", "lstm-co2"])
def test_the_recorded_command_trains_the_same_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that need no extra data and take minutes. The last bits may differ between processors."""
    monkeypatch.chdir(tmp_path)
    noted = record_of(SHIPPED[name])
    arguments = [*shlex.split(noted.command)[3:], "--device", "cpu", "--output", "again.safetensors"]
    assert training.main(arguments) == 0
    again = msgspec.json.decode((tmp_path / "again.json").read_bytes(), type=TrainingRecord)
    assert again.command == noted.command
    for found, shipped in zip(again.metrics, noted.metrics, strict=True):
        assert (found.name, found.dataset, found.samples) == (shipped.name, shipped.dataset, shipped.samples)
        assert found.value == pytest.approx(shipped.value, rel=0.05), found.name
