"""What a head gives: logits get a softmax, probabilities and the values of a regression are served as they are."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor

from export import regression
from export.accuracy import Answers, Measured, value_of
from export.arrays import Array
from export.doubts import guesses
from export.heads import labels_for
from export.labels import Labels, LabelsInvalid
from export.multilabel import average_precision, marks
from export.own import OwnModelInvalid, own_entry
from export.precisions import SKILL
from export.samples import ImageSet
from export.verify import open_session, run
from rafaga import Client
from rafaga.bundle import Head, Precision, Task
from rafaga.cli import main as cli
from rafaga.load.codecs import reader
from rafaga.load.codecs.base import Replies
from rafaga.v1 import vision_pb2
from tests.bundles import random_images
from tests.export import small
from tests.export.exporting import export, exported, pytorch, said, write_photos
from tests.export.test_own import own
from tests.integration.rest import send
from tests.integration.serving import serving

Softmax = partial(small.SmallClassifier, after=lambda logits: logits.softmax(1))
Percent = partial(small.SmallClassifier, after=lambda logits: 100 * logits.softmax(1))
Sigmoid = partial(small.SmallClassifier, after=torch.sigmoid)
One = partial(small.SmallClassifier, after=lambda logits: logits[:, 1])
OneSigmoid = partial(small.SmallClassifier, after=lambda logits: logits[:, 1:2].sigmoid())
SoftmaxSegmenter = partial(small.SmallSegmenter, after=lambda scores: scores.softmax(1))
SoftmaxSequence = partial(small.SmallSequenceModel, after=lambda logits: logits.softmax(2))


def years_and_metres(outputs: Tensor) -> Tensor:
    """Around 40 and 1.7: [N, 2]."""
    return outputs[:, :2] * torch.tensor([20, 0.2]) + torch.tensor([40, 1.7])


Years = partial(small.SmallClassifier, after=years_and_metres)
Value = partial(small.SmallClassifier, after=lambda outputs: years_and_metres(outputs)[:, 0])


def answers(folder: Path, images: Array) -> Array:
    return run(open_session(folder / "repository/my-net/1/model.onnx"), {"image": images})["probabilities"]


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("test_heads:Softmax", "", "sum to 1: expected logits, export adds the softmax. Use --head probabilities"),
        ("test_heads:Percent", "", "sum to 100: expected logits, export adds the softmax. Use --head probabilities"),
        ("test_heads:Sigmoid", "", "all outputs are within 0 and 1: expected logits"),
        ("test_heads:OneSigmoid", "", "the model gives one output: expected one for each class; for yes or no"),
        ("test_heads:Sigmoid", "--head probabilities", "expected outputs of at least 0 whose sum is 1"),
        ("test_heads:Softmax", "--head multilabel", "its labels exclude each other: --head probabilities"),
        ("small:SmallClassifier", "--head probabilities", "expected outputs of at least 0 whose sum is 1"),
        ("test_heads:SoftmaxSegmenter", "--task segmentation", "sum to 1: expected logits"),
        ("test_heads:SoftmaxSequence", "--task sequence --max-length 40", "sum to 1: expected logits"),
        ("small:SmallSegmenter", "--task segmentation --head probabilities", "whose sum is 1 at every pixel"),
    ],
)
def test_outputs_unlike_the_head_are_refused(
    factory: str, options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path, factory, *options.split(), size="any" if "--task" in options else "16") == 1
    assert message in said(capsys)


def test_a_binary_head_takes_one_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path, "small:SmallClassifier", "--head", "binary", labels=("no", "yes")) == 1
    assert "--head binary: expected one output, got 3" in said(capsys)


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
    photos = write_photos(tmp_path / "photos", [str(number) for number in range(16)])
    marked = [[name for place, name in enumerate(small.CLASSES) if (number >> place) % 2] for number in range(16)]
    lines = (",".join([f"{number}.png", *names]) for number, names in enumerate(marked))
    (photos / "labels.csv").write_text("\n".join(lines))
    options = ["--head", "multilabel", "--weights", str(tmp_path / "w.pth"), "--eval-images", str(photos)]
    assert export(tmp_path, factory, *options, "--normalize", "none", "--precisions", "fp32,fp16") == 0
    bundle = exported(tmp_path)
    assert bundle.head is Head.MULTILABEL
    figures = {metric.name: (metric.value, metric.samples) for metric in bundle.variants[0].metrics}
    assert figures.keys() == {"map", "f1"}
    assert all(0 <= value <= 1 and samples == 10 for value, samples in figures.values())
    assert bundle.variants[1].losses[0].metric == "map"

    image = random_images(0, 1, 16, 16)
    expected = pytorch(model, image).sigmoid().numpy()
    np.testing.assert_allclose(answers(tmp_path, image), expected, atol=1e-4)
    if factory.startswith("small"):
        with serving(tmp_path / "repository") as served, Client(served.address) as client:
            found = client.classify(image[0], model="my-net", top_k=3)
            likely = client.classify(image[0], model="my-net", min_probability=0.5)
            assert client.model("my-net").head == "multilabel"
            assert cli(["classify", f"{photos}/0.png", "--min-probability", "1", "--server", served.address]) == 0
            assert "nothing with a probability of 1 or more" in said(capsys)
        assert {p.index: p.probability for p in found} == pytest.approx(dict(enumerate(expected[0])), abs=1e-4)
        assert found.top.index == expected[0].argmax()
        assert {p.index for p in found.at_least(0.5)} == set(np.flatnonzero(expected[0] >= 0.5))
        assert likely.predictions == found.at_least(0.5)


@pytest.mark.parametrize("factory", ["test_heads:One", "test_heads:OneSigmoid"])
def test_binary_gives_no_and_yes(factory: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = small.SmallClassifier().eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    photos = write_photos(tmp_path / "photos", [f"{name}/{n}" for name in ("cat", "not cat") for n in range(8)])
    options = ["--head", "binary", "--eval-images", str(photos), "--weights", str(tmp_path / "w.pth")]
    assert export(tmp_path, factory, *options, "--normalize", "none", labels=("cat",)) == 0
    bundle = exported(tmp_path)
    assert (bundle.labels, bundle.head) == (("not cat", "cat"), Head.BINARY)
    assert bundle.variants[0].metrics[0].name == "top1"
    images = random_images(0, 2, 16, 16)
    yes = pytorch(model, images)[:, 1].sigmoid().numpy()
    np.testing.assert_allclose(answers(tmp_path, images), np.stack([1 - yes, yes], axis=1), atol=1e-4)


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
    for text, message in (("b/c.png,cat", "no line for a"), ("a.png,bird", "has the label 'bird'")):
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(LabelsInvalid, match=message):
            marks(files[:1], tmp_path, labels)


def trained(folder: Path) -> small.SmallClassifier:
    torch.manual_seed(3)
    model = Years().eval()
    with torch.no_grad():
        model.output.weight.mul_(6)
    torch.save(model.state_dict(), folder / "w.pth")
    return model


def test_values_are_measured_judged_and_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1. Targets that are off by 3 years and 0.1 m: those are the errors. 2. The last layer stays in float.
    3. The SDK, REST and the command line get PyTorch's values."""
    model = trained(tmp_path)
    photos = write_photos(tmp_path / "photos", [f"{number:02}" for number in range(24)])
    files = sorted(photos.iterdir())
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    found = zip(files, pytorch(model, pixels).tolist(), strict=True)
    lines = [f"{file.name},{age + 3},{height - 0.1}\n" for file, (age, height) in found]
    (photos / "labels.csv").write_text("".join(lines))
    options = ["--head", "regression", "--eval-images", str(photos), "--normalize", "none"]
    options += ["--weights", str(tmp_path / "w.pth"), "--precisions", "fp32,int8"]
    assert export(tmp_path, "test_heads:Years", *options, labels=("age", "height")) == 0, said(capsys)
    bundle = exported(tmp_path)
    assert (bundle.head, bundle.labels, bundle.outputs[0].name) == (Head.REGRESSION, ("age", "height"), "values")
    figures = {metric.name: metric.value for metric in bundle.variants[0].metrics}
    assert figures.keys() == {"mae of age", "mae of height", "skill"}
    assert (figures["mae of age"], figures["mae of height"]) == pytest.approx((3, 0.1), abs=1e-4)
    eighth = bundle.variants[1]
    assert (eighth.precision, [loss.metric for loss in eighth.losses]) == (Precision.INT8, ["skill", "agreement"])
    graph = onnx.load(tmp_path / "repository/my-net/1" / eighth.file).graph
    quantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    last = [node for node in graph.node if node.op_type in ("Gemm", "MatMul")][-1]
    assert last.input[1] not in quantised

    expected = pytorch(model, pixels[5:6])[0].tolist()
    file = str(files[5])
    capsys.readouterr()
    with serving(tmp_path / "repository") as served, Client(served.address) as client:
        answer = client.classify(pixels[5], model="my-net", min_probability=0.9)
        assert (list(answer.values), answer.predictions) == (["age", "height"], ())
        assert list(answer.values.values()) == pytest.approx(expected, rel=1e-5)
        assert repr(answer).startswith(f"Classification({{'age': {expected[0]:.6g}, 'height': ")
        assert "<td>height</td>" in answer._repr_html_()
        described = client.model("my-net")
        assert (described.head, described.labels) == ("regression", ("age", "height"))
        (result,) = send(served, "/v1/models/my-net:classify", files[5].read_bytes()).json["results"]
        assert [value["label"] for value in result["values"]] == ["age", "height"]
        assert [value["value"] for value in result["values"]] == pytest.approx(expected, rel=1e-5)
        assert "labels" not in result
        assert cli(["classify", file, "--json", "--server", served.address]) == 0
        assert json.loads(capsys.readouterr().out)[0]["values"]["age"] == pytest.approx(expected[0], rel=1e-5)
        assert cli(["classify", file, "--server", served.address]) == 0
        assert re.search(r"OUTPUT +VALUE\nage +\d", capsys.readouterr().out)
        assert cli(["models", "my-net", "--server", served.address]) == 0
        assert re.search(r"head +regression\n", capsys.readouterr().out)


def test_one_value_of_one_dimension(tmp_path: Path) -> None:
    assert export(tmp_path, "test_heads:Value", "--head", "regression", "--ignore-exif", labels=("age",)) == 0
    bundle = exported(tmp_path)
    assert (bundle.labels, bundle.outputs[0].shape) == (("age",), (None, 1))
    assert bundle.image is not None
    assert not bundle.image.exif_orientation


def test_two_outputs_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export(tmp_path, "test_heads:Years", "--head", "regression", labels=("age", "age"))
    assert "two outputs have the same label" in capsys.readouterr().err


def test_targets_of_photos(tmp_path: Path) -> None:
    labels, files = Labels(("age", "height")), [tmp_path / "a.png"]
    with pytest.raises(LabelsInvalid, match=r"labels\.csv: missing; expected lines such as photo\.jpg,age,height"):
        regression.targets(files, tmp_path, labels)
    (tmp_path / "labels.csv").write_text("a.png, 31.5 ,1.8\n")
    assert regression.targets(files, tmp_path, labels).tolist() == [[31.5, 1.8]]
    for line in ("a.png,31.5", "a.png,old,1.8", "a.png,nan,1.8"):
        (tmp_path / "labels.csv").write_text(line)
        with pytest.raises(LabelsInvalid, match=r"a\.png has .*; expected a number for each of age, height"):
            regression.targets(files, tmp_path, labels)


def measured(monkeypatch: pytest.MonkeyPatch, values: np.ndarray, baseline: Measured | None = None) -> Measured:
    """Of `values` [100, 2] where the targets are normal, of deviations 1 and 100."""
    right = np.random.default_rng(0).normal(size=(100, 2)) * (1, 100)
    monkeypatch.setattr(regression, "outputs_of", lambda *_: right + values)
    images = ImageSet("faces", right, lambda rows: np.zeros((len(rows), 1, 1, 3), np.uint8))
    return regression.measure(("age", "income"), None, images, baseline=baseline)


def test_skill_and_agreement_have_no_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that became a constant is refused, although the other is perfect; so is a lost half point of skill."""
    both, kept = np.ones((100, 2)), [("skill", True), ("agreement", True)]
    perfect = measured(monkeypatch, 0 * both)
    assert value_of("skill", perfect.metrics) == 1
    right = perfect.answers.right if isinstance(perfect.answers, Answers) else np.zeros(0)

    def lost(values: np.ndarray) -> list[tuple[str, bool]]:
        losses = SKILL.losses(measured(monkeypatch, values, perfect), perfect, ())
        return [(loss.metric, loss.within) for loss in losses]

    assert lost(0 * both) == kept
    assert lost(np.array([0.003, 0.3]) * both) == kept
    assert lost(np.array([0.01, 0]) * both)[0] == ("skill", False)
    assert lost(np.array([0, 1]) * (right.mean(0) - right)) == [("skill", False), ("agreement", False)]


def test_the_load_tester_compares_values() -> None:
    def reply(*values: float) -> bytes:
        found = vision_pb2.ClassifyResponse()
        result = found.results.add()
        for value in values:
            result.values.add(label="age", value=value)
        return found.SerializeToString()

    replies = reader(Replies.CLASSIFY)
    assert replies.same(reply(31.5, 2), reply(31.500001, 2))
    assert not replies.same(reply(31.5, 2), reply(31.9, 2))


def test_values_that_are_no_better_than_a_constant_are_a_warning(tmp_path: Path) -> None:
    trained(tmp_path)
    photos = write_photos(tmp_path / "photos", [f"{number:02}" for number in range(16)])
    (photos / "labels.csv").write_text("".join(f"{number:02}.png,{-1000 * number}\n" for number in range(16)))
    options = ["--head", "regression", "--eval-images", str(photos), "--weights", str(tmp_path / "w.pth")]
    assert export(tmp_path, "test_heads:Value", *options, labels=("age",)) == 0
    warning = guesses(exported(tmp_path))
    assert warning is not None
    assert warning.startswith("NO BETTER THAN A CONSTANT: the mean absolute error on 10 samples")
