"""One's own model: the description is checked before anything is built, and the proofs are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from export.__main__ import main
from export.graph import SegmentationGraph, serving_graph
from export.labels import Labels
from export.own import OwnModel, OwnModelInvalid, numbers_of, own_entry, size_of, strides_of
from export.publish import require_scores
from export.verify import ProofFailed
from models.entry import ImageInput
from rafaga import bundle as bundles
from rafaga.bundle import Calibration, ImagePreparation, Task
from tests.export import small

GREY = ImageInput(32, 32, 1, (0.5,), (0.25,), 36)


class WithSoftmax(small.SmallClassifier):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).softmax(dim=1)


def not_a_module() -> str:
    return "weights"


def own(**changes: object) -> OwnModel:
    parts: dict[str, object] = {
        "factory": "tests.export.small:SmallClassifier",
        "name": "my-net",
        "task": Task.CLASSIFICATION,
        "size": (16, 16),
        "labels": Labels(small.CLASSES),
    }
    return OwnModel(**(parts | changes))  # type: ignore[arg-type]


def test_defaults_are_imagenets() -> None:
    entry = own_entry(own(resize_shorter=18))
    assert entry.input == ImageInput(16, 16, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 18)
    assert entry.labels() == small.CLASSES
    assert isinstance(entry.build(), small.SmallClassifier)
    assert own_entry(own(size=(32, 32), channels=1, mean=(0.5,), std=(0.25,), resize_shorter=36)).input == GREY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "My Net"}, "--name 'My Net'"),
        ({"labels": None}, "needs --labels"),
        ({"size": None}, "a fixed --input-size"),
        ({"task": Task.FEATURES}, "needs --maps"),
        ({"task": Task.FORECASTING}, "may be for classification, features, segmentation, sequence.*models/zoo.py"),
        ({"task": Task.DETECTION}, "--task detection: a model of your own may be for"),
        ({"task": Task.SEGMENTATION, "labels": None}, "needs --labels FILE, with at most 256"),
        ({"task": Task.SEGMENTATION, "labels": Labels(tuple(map(str, range(257))))}, "at most 256 classes"),
        ({"task": Task.SEQUENCE}, "its symbols, and --max-length"),
        ({"max_length": 9}, "--max-length is for --task sequence"),
        ({"mean": (0.5,)}, "expected 3 numbers each"),
        ({"std": (0.5, 0.5, 0.0)}, "deviations above 0"),
        ({"resize_shorter": 8}, "at least --input-size"),
        ({"factory": "os.path"}, r"expected package\.module:function"),
        ({"factory": "no.such.module:build"}, "No module named 'no'"),
        ({"factory": "tests.export.small:Absent"}, "no attribute 'Absent'"),
        ({"factory": "tests.export.small:CLASSES"}, "not a function"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_makes_no_sense_is_named(changes: dict[str, object], message: str) -> None:
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
    for parse, text in ((size_of, "big"), (size_of, "0"), (numbers_of, "a"), (strides_of, "c3"), (strides_of, "c3:x")):
        with pytest.raises(ValueError):
            parse(text)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "birds" / "images"
    folder.mkdir(parents=True)
    for number in range(16):
        colour = (40 + 10 * number, 250 - 10 * number, 7 * number)
        Image.new("RGB", (24, 20), colour).save(folder / f"{small.CLASSES[number % 3]}_{number}.png")
    return folder


def test_as_a_command(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With weights of a file: every variant is published, measured on the photos, and calibrated with others."""
    torch.manual_seed(1)
    torch.save({"state_dict": small.SmallClassifier().state_dict()}, tmp_path / "my.pth")
    (tmp_path / "labels.txt").write_text("\n".join(small.CLASSES))
    code = main(
        [
            *("--factory", "tests.export.small:SmallClassifier", "--name", "my-net", "--input-size", "16"),
            *("--labels", str(tmp_path / "labels.txt"), "--weights", str(tmp_path / "my.pth")),
            *("--eval-images", str(photos), "--dataset", "colours", "--resize-shorter", "18"),
            *("--output", str(tmp_path / "repository")),
        ]
    )
    assert code == 0, capsys.readouterr().out
    bundle = bundles.load(tmp_path / "repository" / "my-net" / "1")
    assert bundle.weights.trained
    assert bundle.weights.source == "file my.pth"
    assert bundle.labels == small.CLASSES
    assert bundle.image == ImagePreparation(height=16, width=16, channels=3, resize_shorter=18)
    assert (bundle.dataset, bundle.architecture) == ("colours", "tests.export.small:SmallClassifier")
    assert [variant.precision for variant in bundle.variants] == ["fp32", "fp16", "int8"]
    for variant in bundle.variants:
        (top1,) = variant.metrics
        assert (top1.samples, top1.dataset) == (10, "birds, 10 of 16")
    half, eighth = bundle.variants[1:]
    assert not half.default_eligible, "ten photos show nothing"
    assert (half.calibration, eighth.calibration) == (None, Calibration(dataset="birds, 2 of 16", samples=2))
    assert main(["verify", str(tmp_path / "repository")]) == 0


def test_a_second_softmax_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(small.CLASSES))
    code = main(
        [
            *("--factory", "tests.export.test_own:WithSoftmax", "--name", "my-net", "--input-size", "16"),
            *(
                "--labels",
                str(tmp_path / "labels.txt"),
                "--weights",
                "random",
                "--output",
                str(tmp_path / "repository"),
            ),
        ]
    )
    assert code == 1
    assert "expected logits" in capsys.readouterr().out
    assert not list((tmp_path / "repository" / "my-net").iterdir())


def test_a_backbone_of_any_size(tmp_path: Path) -> None:
    code = main(
        [
            *("--factory", "tests.export.small:SmallBackbone", "--name", "my-maps", "--task", "features"),
            *("--input-size", "any", "--maps", "fine:2,coarse:8", "--weights", "random"),
            *("--output", str(tmp_path)),
        ]
    )
    assert code == 0
    bundle = bundles.load(tmp_path / "my-maps" / "1")
    assert [(feature.output, feature.stride) for feature in bundle.features] == [("fine", 2), ("coarse", 8)]
    assert bundle.inputs[0].shape == (None, None, None, 3)
    assert [variant.default_eligible for variant in bundle.variants] == [True, False, False]


def test_a_segmenter_of_any_size(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(small.CLASSES))
    code = main(
        [
            *("--factory", "tests.export.small:SmallSegmenter", "--name", "my-regions", "--task", "segmentation"),
            *("--labels", str(tmp_path / "labels.txt"), "--weights", "random", "--precisions", "fp32"),
            *("--output", str(tmp_path / "repository")),
        ]
    )
    assert code == 0
    bundle = bundles.load(tmp_path / "repository" / "my-regions" / "1")
    assert (bundle.task, bundle.labels) == ("segmentation", small.CLASSES)
    assert bundle.inputs[0].shape == (None, None, None, 3)


def test_a_next_symbol_model(tmp_path: Path) -> None:
    (tmp_path / "symbols.txt").write_text("\n".join(small.CLASSES))
    code = main(
        [
            *("--factory", "tests.export.small:SmallSequenceModel", "--name", "my-words", "--task", "sequence"),
            *("--labels", str(tmp_path / "symbols.txt"), "--max-length", "50", "--weights", "random"),
            *("--output", str(tmp_path / "repository")),
        ]
    )
    assert code == 0
    bundle = bundles.load(tmp_path / "repository" / "my-words" / "1")
    assert bundle.sequence is not None
    assert (bundle.task, bundle.labels, bundle.sequence.max_length) == ("sequence", small.CLASSES, 50)


def test_scores_of_other_classes_or_another_size_are_refused() -> None:
    graph = serving_graph(small.segmenter(), small.SmallSegmenter())
    assert isinstance(graph.module, SegmentationGraph)
    image = {"image": np.zeros((2, 24, 20, 3), np.uint8)}
    require_scores(graph.module, image, classes=3)
    with pytest.raises(ProofFailed, match=r"expected; the model gives \(1, 3, 24, 20\)"):
        require_scores(graph.module, image, classes=4)
    coarse = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2))
    graph = serving_graph(small.segmenter(), coarse)
    assert isinstance(graph.module, SegmentationGraph)
    with pytest.raises(ProofFailed, match=r"the model gives \(1, 3, 12, 10\)"):
        require_scores(graph.module, image, classes=3)


def test_wrong_labels_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    code = main(
        [
            *("--factory", "tests.export.small:SmallClassifier", "--name", "my-net", "--input-size", "16"),
            *(
                "--labels",
                str(tmp_path / "labels.txt"),
                "--weights",
                "random",
                "--output",
                str(tmp_path / "repository"),
            ),
        ]
    )
    assert code == 1
    assert "2 labels, but" in capsys.readouterr().out
