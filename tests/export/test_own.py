"""Your own model: its description is checked before anything is built, and its files pass the same checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import nn

from export.graph import SegmentationGraph, serving_graph
from export.labels import Labels
from export.own import (
    OwnModel,
    OwnModelInvalid,
    assumptions,
    numbers_of,
    own_entry,
    read_own_series,
    size_of,
    strides_of,
)
from export.publish import require_scores
from export.verify import ProofFailed
from models.entry import ImageInput
from rafaga.bundle import Calibration, ImagePreparation, SequenceSpec, Task
from tests.export import small
from tests.export.exporting import export, exported, said, write_photos
from tests.export.small import SERIES

FORECASTING: dict[str, Any] = {"task": Task.FORECASTING, "forecast": SERIES}
GREY = ImageInput(32, 32, 1, (0.5,), (0.25,), 36)


def not_a_module() -> str:
    return "weights"


def own(**changes: Any) -> OwnModel:
    parts: dict[str, Any] = {
        "factory": "tests.export.small:SmallClassifier",
        "name": "my-net",
        "task": Task.CLASSIFICATION,
        "size": (16, 16),
        "labels": Labels(small.CLASSES),
    }
    return OwnModel(**(parts | changes))


def test_defaults_are_imagenets() -> None:
    entry = own_entry(own(resize_shorter=18))
    assert entry.input == ImageInput(16, 16, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 18)
    assert entry.labels() == small.CLASSES
    assert isinstance(entry.build(), small.SmallClassifier)
    plain = own_entry(own(normalize="none")).input
    assert plain == ImageInput(16, 16, 3, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert own_entry(own(size=(32, 32), channels=1, mean=(0.5,), std=(0.25,), resize_shorter=36)).input == GREY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "My Net"}, "--name 'My Net'"),
        ({"size": None}, "a fixed --input-size"),
        ({"task": Task.FEATURES}, "needs --maps"),
        ({"task": Task.DETECTION}, "the detector's own transform sets the size and the pixels; leave out --input-size"),
        (
            {"task": Task.DETECTION, "size": None},
            r"tests\.export\.small\.SmallClassifier is none of torchvision's SSD, RetinaNet, FCOS, FasterRCNN",
        ),
        ({"task": Task.FORECASTING}, "needs --horizon, --min-history and --max-history"),
        ({"forecast": SERIES}, "are for --task forecasting"),
        ({**FORECASTING, "forecast": replace(SERIES, quantile_levels=(0.9, 0.5))}, "--quantiles: expected ascending"),
        ({**FORECASTING, "forecast": replace(SERIES, season=24)}, "--season <= --min-history <= --max-history"),
        ({**FORECASTING, "series": np.zeros(19, np.float32)}, "--eval-series: 19 observations; expected at least 20"),
        ({**FORECASTING, "series": np.ones(60, np.float32)}, "--eval-series repeats itself exactly"),
        ({"task": Task.SEQUENCE}, "its symbols, and --max-length"),
        ({"max_length": 9}, "--max-length is for --task sequence"),
        ({"mean": (0.5,)}, "expected 3 numbers each"),
        ({"std": (0.5, 0.5, 0.0)}, "deviations above 0"),
        ({"mean": (0.5, 0.5, 0.5), "normalize": "none"}, "--normalize sets the mean and the deviation"),
        ({"channels": 1, "normalize": "imagenet"}, "--normalize imagenet is for 3 channels, the model takes 1"),
        ({"resize_shorter": 8}, "at least --input-size"),
        ({"factory": "os.path"}, r"expected package\.module:function"),
        ({"factory": "no.such.module:build"}, "No module named 'no'"),
        ({"factory": "tests.export.small:Absent"}, "no attribute 'Absent'"),
        ({"factory": "tests.export.small:CLASSES"}, "not a function"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_invalid_description_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(OwnModelInvalid, match=message):
        own_entry(own(**changes))


def test_a_factory_must_return_a_module() -> None:
    entry = own_entry(own(factory="tests.export.test_own:not_a_module"))
    with pytest.raises(OwnModelInvalid, match=r"expected a torch\.nn\.Module, got str"):
        entry.build()


def test_words_of_the_command_line() -> None:
    assert size_of("224") == (224, 224)
    assert size_of("480x640") == (480, 640)
    assert size_of("any") is None
    assert numbers_of("0.5,1") == (0.5, 1.0)
    assert strides_of("c3:8,embedding:0") == {"c3": 8, "embedding": 0}
    wrong: list[tuple[Any, str]] = [
        (size_of, "big"), (size_of, "0"), (numbers_of, "a"), (strides_of, "c3"), (strides_of, "c3:x")
    ]  # fmt: skip
    for parse, text in wrong:
        with pytest.raises(ValueError):
            parse(text)


def test_a_classifier_with_weights_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every variant is published, measured on labelled photos, and calibrated with others of them."""
    names = [f"{small.CLASSES[number % 3]}_{number}" for number in range(16)]
    photos = write_photos(tmp_path / "birds" / "images", names, size=(24, 20))
    torch.manual_seed(1)
    torch.save({"state_dict": small.SmallClassifier().state_dict()}, tmp_path / "my.pth")
    options = ["--resize-shorter", "18", "--weights", str(tmp_path / "my.pth"), "--precisions", "fp32,fp16,int8"]
    options += ["--eval-images", str(photos), "--classes-from", "file", "--dataset", "colours"]
    assert export(tmp_path, "small:SmallClassifier", *options) == 0, said(capsys)
    bundle = exported(tmp_path)
    assert (bundle.weights.trained, bundle.weights.source) == (True, "file my.pth, state_dict")
    assert bundle.labels == small.CLASSES
    assert bundle.image == ImagePreparation(height=16, width=16, channels=3, resize_shorter=18)
    assert (bundle.dataset, bundle.architecture) == ("colours", "tests.export.small:SmallClassifier")
    assert [variant.precision for variant in bundle.variants] == ["fp32", "fp16", "int8"]
    assert {(v.metrics[0].samples, v.metrics[0].dataset) for v in bundle.variants} == {(10, "birds, 10 of 16")}
    half, eighth = bundle.variants[1:]
    assert not half.default_eligible, "ten photos are too few"
    assert (half.calibration, eighth.calibration) == (None, Calibration(dataset="birds, 2 of 16", samples=2))


def test_a_factory_that_holds_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path, "small:SmallClassifier", "--weights", "factory", "--license", "MIT") == 0
    weights = exported(tmp_path).weights
    assert (weights.trained, weights.license) == (True, "MIT")
    assert weights.source == "built by tests.export.small:SmallClassifier"
    assert f"weights: {weights.source}" in said(capsys)


def test_without_labels_the_classes_have_numbers_and_what_was_assumed_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path, "small:SmallClassifier", labels=None) == 0
    assert exported(tmp_path).labels == ("0", "1", "2")
    printed = said(capsys)
    assert "input: 16 x 16 RGB, resized to it without cropping (bilinear)" in printed
    assert "pixels in 0..1, minus the mean 0.485, 0.456, 0.406, divided by 0.229, 0.224, 0.225" in printed
    assert "size, interpolation and pixels: assumed, where no option gives them" in printed
    assert "labels: the class numbers 0 to 2; to name the classes: --labels FILE" in printed
    stored = exported(tmp_path).assumptions
    assert len(stored) == 4
    assert all(line in printed for line in stored)


def test_assumptions_of_other_models() -> None:
    assert assumptions(own_entry(own(task=Task.SEQUENCE, max_length=50)), small.CLASSES, named=True) == []
    grey = own_entry(own(size=(32, 32), channels=1, resize_shorter=36))
    size, pixels, _ = assumptions(grey, small.CLASSES, named=True)
    assert size == "input: 32 x 32 grey, the centre of an image whose shorter side is resized to 36 (bilinear)"
    assert pixels == "pixels in 0..1, minus the mean 0, divided by 1"
    backbone = own_entry(own(task=Task.FEATURES, size=None, strides={"c3": 8}))
    assert assumptions(backbone, (), named=False)[0] == "input: any size, RGB"


def test_a_segmenter_of_any_size_and_a_next_symbol_model() -> None:
    entry = own_entry(own(task=Task.SEGMENTATION, size=None))
    assert isinstance(entry.input, ImageInput)
    assert (entry.input.height, entry.labels()) == (None, small.CLASSES)
    assert own_entry(own(task=Task.SEQUENCE, max_length=50)).input == SequenceSpec(max_length=50)


def test_labels_of_other_classes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path, "small:SmallClassifier", labels=("one", "two")) == 1
    assert "2 labels, but" in said(capsys)
    assert not list(tmp_path.glob("repository/my-net/*"))


def test_scores_of_other_classes_or_another_size_are_refused() -> None:
    image = {"image": np.zeros((2, 24, 20, 3), np.uint8)}
    coarse = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2))
    for model, classes, message in (
        (small.SmallSegmenter(), 4, r"\(1, 4, 24, 20\) expected; the model gives \(1, 3, 24, 20\)"),
        (coarse, 3, r"the model gives \(1, 3, 12, 10\)"),
        (coarse, 257, "257 classes; expected at most 256"),
    ):
        graph = serving_graph(small.segmenter(), model)
        assert isinstance(graph.module, SegmentationGraph)
        with pytest.raises(ProofFailed, match=message):
            require_scores(graph.module, image, classes)


def test_a_model_that_fails_in_pytorch_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images of one channel for a network of three, with and without labels; the traceback only where asked."""
    assert export(tmp_path, "small:SmallClassifier", "--channels", "1") == 1
    printed = said(capsys)
    assert "float32 [2, 1, 16, 16]; check --channels and --input-size: RuntimeError: Given groups=1" in printed
    assert "to have 3 channels, but got 1 channels instead (small.py:" in printed
    assert "Traceback" not in printed
    assert export(tmp_path, "small:SmallClassifier", "--channels", "1", "--traceback", labels=None) == 1
    printed = said(capsys)
    assert "float32 [1, 1, 16, 16]; check" in printed
    assert "Traceback" in printed


def test_a_forecaster_is_measured_on_a_series_of_a_file(tmp_path: Path) -> None:
    series = 100 + np.arange(60) % 7
    (tmp_path / "load.csv").write_text("hour,MW\n" + "".join(f"{hour},{value}\n" for hour, value in enumerate(series)))
    torch.save(small.SmallForecaster().state_dict(), tmp_path / "weights.pth")
    options = ["--task=forecasting", "--horizon=4", "--min-history=5", "--max-history=40", "--quantiles=0.1,0.5,0.9"]
    options += ["--season=3", "--step=hour", "--frequency=H", "--unit=MW", "--dataset=my load"]
    options += [f"--weights={tmp_path}/weights.pth", f"--eval-series={tmp_path}/load.csv:MW"]
    assert export(tmp_path, "small:SmallForecaster", *options, size=None, labels=None) == 0
    bundle = exported(tmp_path)
    assert bundle.forecast == SERIES
    figures = {metric.name: metric for metric in bundle.variants[0].metrics}
    assert {"mase", "pinball", "coverage_80", "mase_seasonal_naive"} <= figures.keys()
    assert (figures["mase"].dataset, figures["mase"].samples) == ("my load, last fifth", 9)


def test_files_of_no_series_are_refused(tmp_path: Path) -> None:
    (tmp_path / "two.csv").write_text("a,b\n1,2\n")
    assert read_own_series(f"{tmp_path}/two.csv:b").tolist() == [2]
    with pytest.raises(OwnModelInvalid, match="FILE:COLUMN: a, b"):
        read_own_series(f"{tmp_path}/two.csv")
    with pytest.raises(OwnModelInvalid, match="No such file"):
        read_own_series(f"{tmp_path}/none.csv")
