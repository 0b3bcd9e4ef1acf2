"""The registry as a whole."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from models.entry import ImageInput, SequenceInput, SeriesInput, Shipped, Task, Torchvision
from models.expectation import shortfalls
from models.training.__main__ import Record
from models.zoo import Entry, catalogue
from rafaga.bundle import NAME_PATTERN, Metric, sha256_of
from tests.models.names import NAMES

ENTRIES = list(catalogue().values())


def test_the_catalogue_is_whole() -> None:
    assert set(catalogue()) == NAMES
    assert len(ENTRIES) == len(NAMES)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_entries_are_whole(entry: Entry) -> None:
    assert NAME_PATTERN.fullmatch(entry.name)
    assert isinstance(entry.input, SeriesInput) == (entry.task is Task.FORECASTING)
    assert isinstance(entry.input, SequenceInput) == (entry.task is Task.SEQUENCE)
    assert bool(entry.labels()) == (entry.task not in (Task.FEATURES, Task.FORECASTING))
    assert (entry.detection is not None) == (entry.task is Task.DETECTION)
    assert bool(entry.strides) == (entry.task is Task.FEATURES)
    assert bool(entry.expected) != bool(entry.unpromised), "a figure, or why there is none"
    if isinstance(entry.input, ImageInput):
        assert len(entry.input.mean) == len(entry.input.std) == entry.input.channels


@pytest.mark.parametrize("entry", [e for e in ENTRIES if isinstance(e.weights, Torchvision)], ids=lambda e: e.name)
def test_figures_and_labels_are_the_weights_own(entry: Entry) -> None:
    assert isinstance(entry.weights, Torchvision)
    from torchvision.models import get_weight

    weights = get_weight(entry.weights.member)  # raises where there is no such member
    if entry.labels():
        assert entry.labels() == tuple(weights.meta["categories"])
    if entry.task is Task.CLASSIFICATION:
        assert entry.expected["top1"] == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100


TRAINED_ON_DEMAND = {"plain20-cifar10", "resnet56-cifar10", "plain56-cifar10"}


@pytest.mark.parametrize("entry", [e for e in ENTRIES if isinstance(e.weights, Shipped)], ids=lambda e: e.name)
def test_shipped_weights_have_a_true_record(entry: Entry) -> None:
    assert isinstance(entry.weights, Shipped)
    if entry.name in TRAINED_ON_DEMAND:
        assert not entry.weights.path.exists()
        return
    record = msgspec.json.decode(entry.weights.path.with_suffix(".json").read_bytes(), type=Record)
    assert (record.name, record.architecture, record.dataset) == (entry.name, entry.architecture, entry.dataset)
    assert record.sha256 == sha256_of(entry.weights.path)
    assert record.parameters == sum(p.numel() for p in entry.build().parameters())
    assert not list(shortfalls(entry, record.metrics))
    assert set(entry.expected) <= {metric.name for metric in record.metrics}


def test_importing_the_registry_imports_no_torchvision() -> None:
    code = "import sys, models.zoo; sys.exit('torchvision' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_figures_are_held_to_what_is_expected() -> None:
    entry = next(e for e in ENTRIES if e.name == "resnet50")

    def said(name: str, value: float) -> list[str]:
        return [str(s) for s in shortfalls(entry, [Metric(name=name, value=value, dataset="photos", samples=100)])]

    assert not said("top1", 0.81)
    assert not said("similarity", 0.1), "nothing is expected of it"
    assert said("top1", 0.8) == ["top1 0.8000 ± 0.0400 on 100 samples of photos; expected at least 0.8086"]
    entry = next(e for e in ENTRIES if e.name == "lstm-ett")
    assert not said("mase", 0.99)
    assert said("mase", 1.0) == ["mase 1.0000 on 100 samples of photos; expected below 1.0000"]
