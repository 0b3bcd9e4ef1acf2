"""Outputs that are not logits get no second softmax: they are refused, or served unchanged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from export.__main__ import main
from export.arrays import Array
from export.heads import labels_for
from export.labels import Labels, LabelsInvalid
from export.multilabel import average_precision, marks
from export.own import OwnModelInvalid, own_entry
from export.verify import open_session, run
from rafaga import Client
from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Head, Task
from rafaga.cli import main as cli
from tests.export import small
from tests.export.test_own import own
from tests.integration.serving import serving


class Softmax(small.SmallClassifier):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).softmax(dim=1)


class Percent(small.SmallClassifier):
    def forward(self, image: Tensor) -> Tensor:
        return 100 * super().forward(image).softmax(dim=1)


class Sigmoid(small.SmallClassifier):
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).sigmoid()


class One(small.SmallClassifier):
    """One logit per image, [N]."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)[:, 1]


class OneSigmoid(small.SmallClassifier):
    """One probability per image, [N, 1]."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)[:, 1:2].sigmoid()


class SoftmaxSegmenter(small.SmallSegmenter):
    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return (super().forward(image)[0].softmax(dim=1),)


class SoftmaxSequence(small.SmallSequenceModel):
    def forward(self, symbols: Tensor) -> Tensor:
        return super().forward(symbols).softmax(dim=2)


def export(folder: Path, factory: str, *options: str, size: str = "16") -> int:
    (folder / "labels.txt").write_text("\n".join(small.CLASSES))
    command = ["--factory", f"tests.export.{factory}", "--name", "my-net", "--precisions", "fp32"]
    command += ["--input-size", size, "--output", str(folder / "repository")]
    if "--labels" not in options:
        command += ["--labels", str(folder / "labels.txt")]
    return main([*command, *([] if "--weights" in options else ["--weights", "random"]), *options])


def exported(folder: Path) -> Bundle:
    return bundles.load(folder / "repository" / "my-net" / "1")


def answers(folder: Path, images: Array) -> Array:
    return run(open_session(folder / "repository/my-net/1/model.onnx"), {"image": images})["probabilities"]


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("test_heads:Softmax", (), "sum to 1: expected logits, export adds the softmax. Use --head probabilities"),
        (
            "test_heads:Percent",
            (),
            "sum to 100: expected logits, export adds the softmax. Use --head probabilities, after",
        ),
        ("test_heads:Sigmoid", (), "all outputs are within 0 and 1: expected logits"),
        ("test_heads:OneSigmoid", (), "the model gives one output: expected one for each class; for yes or no"),
        ("test_heads:Sigmoid", ("--head", "probabilities"), "expected outputs of at least 0 whose sum is 1"),
        ("test_heads:Softmax", ("--head", "multilabel"), "its labels exclude each other: --head probabilities"),
        ("small:SmallClassifier", ("--head", "probabilities"), "expected outputs of at least 0 whose sum is 1"),
        ("test_heads:SoftmaxSegmenter", ("--task", "segmentation"), "sum to 1: expected logits"),
        ("test_heads:SoftmaxSequence", ("--task", "sequence", "--max-length", "40"), "sum to 1: expected logits"),
        (
            "small:SmallSegmenter",
            ("--task", "segmentation", "--head", "probabilities"),
            "whose sum is 1 at every pixel",
        ),
    ],
)
def test_outputs_unlike_the_head_are_refused(
    factory: str, options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path, factory, *options, size="any" if "--task" in options else "16") == 1
    assert message in " ".join(capsys.readouterr().out.split())


def test_a_binary_head_takes_one_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "two.txt").write_text("no\nyes")
    assert export(tmp_path, "small:SmallClassifier", "--head", "binary", "--labels", str(tmp_path / "two.txt")) == 1
    assert "--head binary: expected one output, got 3" in capsys.readouterr().out


def test_probabilities_are_served_as_they_are(tmp_path: Path) -> None:
    assert export(tmp_path, "test_heads:Softmax", "--head", "probabilities") == 0
    assert exported(tmp_path).head is Head.PROBABILITIES
    segmenter = ["--task", "segmentation", "--head", "probabilities", "--version", "2"]
    assert export(tmp_path, "test_heads:SoftmaxSegmenter", *segmenter, size="any") == 0


@pytest.mark.parametrize("factory", ["test_heads:Sigmoid", "small:SmallClassifier"])
def test_multilabel_with_and_without_its_sigmoid(
    factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights: the same independent probabilities; measured by mAP and F1, and served."""
    torch.manual_seed(3)
    model = small.SmallClassifier().eval()
    with torch.no_grad():
        model.output.weight.mul_(6)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    photos = tmp_path / "photos"
    photos.mkdir()
    lines = []
    for number in range(16):
        Image.new("RGB", (16, 16), (15 * number, 255 - 15 * number, 100)).save(photos / f"{number}.png")
        names = [name for place, name in enumerate(small.CLASSES) if (number >> place) % 2]
        lines.append(",".join([f"{number}.png", *names]))
    (photos / "labels.csv").write_text("\n".join(lines))
    options = ["--head", "multilabel", "--weights", str(tmp_path / "w.pth"), "--eval-images", str(photos)]
    assert export(tmp_path, factory, *options, "--normalize", "none", "--precisions", "fp32,fp16") == 0
    bundle = exported(tmp_path)
    assert bundle.head is Head.MULTILABEL
    figures = {metric.name: (metric.value, metric.samples) for metric in bundle.variants[0].metrics}
    assert figures.keys() == {"map", "f1"}
    assert all(0 <= value <= 1 and samples == 10 for value, samples in figures.values())
    assert bundle.variants[1].loss is not None
    assert bundle.variants[1].loss.metric == "map"

    image = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = model(torch.from_numpy(image).permute(0, 3, 1, 2) / 255).sigmoid().numpy()
    np.testing.assert_allclose(answers(tmp_path, image), expected, atol=1e-4)
    if factory.startswith("small"):
        with serving(tmp_path / "repository") as served, Client(served.address) as client:
            found = client.classify(image[0], model="my-net", top_k=3)
            likely = client.classify(image[0], model="my-net", min_probability=0.5)
            assert client.model("my-net").head == "multilabel"
            assert cli(["classify", f"{photos}/0.png", "--min-probability", "1", "--server", served.address]) == 0
            assert "nothing with a probability of 1 or more" in capsys.readouterr().out
        assert {p.index: p.probability for p in found} == pytest.approx(dict(enumerate(expected[0])), abs=1e-4)
        assert found.top.index == expected[0].argmax()
        assert {p.index for p in found.at_least(0.5)} == set(np.flatnonzero(expected[0] >= 0.5))
        assert likely.predictions == found.at_least(0.5)


@pytest.mark.parametrize("factory", ["test_heads:One", "test_heads:OneSigmoid"])
def test_binary_gives_no_and_yes(factory: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = small.SmallClassifier().eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    (tmp_path / "yes.txt").write_text("cat")
    photos = tmp_path / "photos"
    for name in ("cat", "not cat"):
        (photos / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (16, 16), (30 * number, 20, 7)).save(photos / name / f"{number}.png")
    options = ["--head", "binary", "--labels", str(tmp_path / "yes.txt"), "--eval-images", str(photos)]
    assert export(tmp_path, factory, *options, "--weights", str(tmp_path / "w.pth"), "--normalize", "none") == 0
    bundle = exported(tmp_path)
    assert (bundle.labels, bundle.head) == (("not cat", "cat"), Head.BINARY)
    assert bundle.variants[0].metrics[0].name == "top1"
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    with torch.inference_mode():
        yes = model(torch.from_numpy(image).permute(0, 3, 1, 2) / 255)[:, 1].sigmoid().numpy()
    np.testing.assert_allclose(answers(tmp_path, image), np.stack([1 - yes, yes], axis=1), atol=1e-4)


def test_labels_of_a_binary_head() -> None:
    assert labels_for(Head.BINARY, Labels(("dog", "cat"))) == Labels(("dog", "cat"))
    assert labels_for(Head.LOGITS, Labels(("cat",))) == Labels(("cat",))
    with pytest.raises(LabelsInvalid, match="got 3"):
        labels_for(Head.BINARY, Labels(small.CLASSES))
    wrong: dict[str, Any] = {"head": Head.BINARY, "task": Task.SEGMENTATION}
    with pytest.raises(OwnModelInvalid, match="--head binary is not for --task segmentation"):
        own_entry(own(**wrong))


def test_average_precision() -> None:
    right = np.array([True, False, True, False])
    assert average_precision(np.array([0.9, 0.8, 0.7, 0.1]), right) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([0.9, 0.1, 0.8, 0.2]), right) == 1
    assert average_precision(np.full(4, 0.5), right) == pytest.approx((1 / 3 + 2 / 4) / 2), "ties count against it"
    assert not math.isnan(average_precision(np.zeros(1), np.array([True])))


def test_photos_with_several_labels(tmp_path: Path) -> None:
    labels = Labels(("cat", "dog"))
    files = [tmp_path / "a.png", tmp_path / "b" / "c.png"]
    with pytest.raises(LabelsInvalid, match=r"labels\.csv: missing"):
        marks(files, tmp_path, labels)
    (tmp_path / "labels.csv").write_text("\ufeffa.png, dog ,cat\nb/c.png\n", encoding="utf-8")
    assert marks(files, tmp_path, labels).tolist() == [[1, 1], [0, 0]]
    with pytest.raises(LabelsInvalid, match="no line for d"):
        marks([tmp_path / "d.png"], tmp_path, labels)
    (tmp_path / "labels.csv").write_text("a.png,bird")
    with pytest.raises(LabelsInvalid, match="has the label 'bird'"):
        marks(files[:1], tmp_path, labels)
