"""The catalogue as a whole."""

from __future__ import annotations

import msgspec
import pytest
from torchvision.models import get_weight

from models.entry import Entry, ImageInput, Shipped, Torchvision
from models.expectation import shortfalls
from models.training.__main__ import TrainingRecord
from models.zoo import catalogue
from rafaga.bundle import NAME_PATTERN, ForecastSpec, Metric, SequenceSpec, Task, sha256_of

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
