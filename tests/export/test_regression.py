"""A regression model gives its values as they are: exported, measured, judged and served."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor

from export import regression
from export.accuracy import Answers, Measured, value_of
from export.doubts import guesses
from export.labels import Labels, LabelsInvalid
from export.precisions import SKILL
from export.samples import ImageSet
from rafaga import Client
from rafaga.bundle import Head, Precision
from rafaga.cli import main as cli
from rafaga.load.codecs import reader
from rafaga.load.codecs.base import Replies
from rafaga.v1 import vision_pb2
from tests.export import small
from tests.export.test_heads import export, exported
from tests.integration.rest import send
from tests.integration.serving import serving


class Years(small.SmallClassifier):
    """Two values: years around 40, and metres."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)[:, :2] * torch.tensor([20, 0.2]) + torch.tensor([40, 1.7])


class One(Years):
    """[N]"""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)[:, 0]


def trained(folder: Path) -> small.SmallClassifier:
    torch.manual_seed(3)
    model = Years().eval()
    with torch.no_grad():
        model.output.weight.mul_(6)
    torch.save(model.state_dict(), folder / "w.pth")
    return model


def answer(model: small.SmallClassifier, pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = model(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).numpy()
    return found


def test_values_are_measured_judged_and_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1. Targets that are off by 3 years and 0.1 m: those are the errors. 2. The last layer stays in float.
    3. The SDK, REST and the command line get PyTorch's values."""
    model, photos = trained(tmp_path), tmp_path / "photos"
    photos.mkdir()
    pixels = np.stack([np.full((16, 16, 3), (8 * i, 255 - 8 * i, 100), np.uint8) for i in range(24)])
    for number, (image, (age, height)) in enumerate(zip(pixels, answer(model, pixels).tolist(), strict=True)):
        Image.fromarray(image).save(photos / f"{number:02}.png")
        with (photos / "labels.csv").open("a") as lines:
            lines.write(f"{number:02}.png,{age + 3},{height - 0.1}\n")
    (tmp_path / "names.txt").write_text("age\nheight")
    options = ["--head", "regression", "--labels", str(tmp_path / "names.txt"), "--eval-images", str(photos)]
    options += ["--normalize", "none", "--weights", str(tmp_path / "w.pth"), "--precisions", "fp32,int8"]
    assert export(tmp_path, "test_regression:Years", *options) == 0, capsys.readouterr().out
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

    expected = answer(model, pixels[5:6])[0]
    file = str(photos / "05.png")
    capsys.readouterr()
    with serving(tmp_path / "repository") as served, Client(served.address) as client:
        found = client.classify(pixels[5], model="my-net", min_probability=0.9)
        assert (list(found.values), found.predictions) == (["age", "height"], ())
        assert list(found.values.values()) == pytest.approx(expected, rel=1e-5)
        assert repr(found).startswith(f"Classification({{'age': {expected[0]:.6g}, 'height': ")
        assert "<td>height</td>" in found._repr_html_()
        described = client.model("my-net")
        assert (described.head, described.labels) == ("regression", ("age", "height"))
        (result,) = send(served, "/v1/models/my-net:classify", Path(file).read_bytes()).json["results"]
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
    (tmp_path / "age.txt").write_text("age")
    options = ["--head", "regression", "--labels", str(tmp_path / "age.txt"), "--ignore-exif"]
    assert export(tmp_path, "test_regression:One", *options) == 0
    bundle = exported(tmp_path)
    assert (bundle.labels, bundle.outputs[0].shape) == (("age",), (None, 1))
    assert bundle.image is not None
    assert not bundle.image.exif_orientation


def test_two_outputs_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.txt").write_text("age\nage")
    with pytest.raises(SystemExit):
        export(tmp_path, "test_regression:Years", "--head", "regression", "--labels", str(tmp_path / "names.txt"))
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
    perfect = measured(monkeypatch, np.zeros((100, 2)))
    assert value_of("skill", perfect.metrics) == 1
    right = perfect.answers.right if isinstance(perfect.answers, Answers) else np.zeros(0)

    def lost(values: np.ndarray) -> list[tuple[str, bool]]:
        return [
            (loss.metric, loss.within) for loss in SKILL.losses(measured(monkeypatch, values, perfect), perfect, ())
        ]

    assert lost(np.zeros((100, 2))) == [("skill", True), ("agreement", True)]
    assert lost(np.array([0.003, 0.3]) * np.ones((100, 2))) == [("skill", True), ("agreement", True)]
    assert lost(np.array([0.01, 0]) * np.ones((100, 2)))[0] == ("skill", False)
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
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(16):
        Image.new("RGB", (16, 16), (15 * number, 9, 7)).save(photos / f"{number:02}.png")
    (photos / "labels.csv").write_text("".join(f"{number:02}.png,{-1000 * number}\n" for number in range(16)))
    (tmp_path / "age.txt").write_text("age")
    options = ["--head", "regression", "--labels", str(tmp_path / "age.txt"), "--eval-images", str(photos)]
    assert export(tmp_path, "test_regression:One", *options, "--weights", str(tmp_path / "w.pth")) == 0
    warning = guesses(exported(tmp_path))
    assert warning is not None
    assert warning.startswith("NO BETTER THAN A CONSTANT: the mean absolute error on 10 samples")
