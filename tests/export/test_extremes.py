"""Uniform, extreme and repeated inputs are part of the proof; NaN for them is warned about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from torch import Tensor

from export import precisions
from export.__main__ import main
from export.evidence import Sources
from export.extremes import extremes
from export.graph import serving_graph
from export.publish import ExportRequest, publish
from models.entry import Entry
from models.progress import Silent
from rafaga import bundle as bundles
from rafaga.bundle import Precision
from tests.export import small


class Normalising(small.SmallClassifier):
    """Divides by the deviation of each image."""

    def forward(self, image: Tensor) -> Tensor:
        mean, deviation = image.mean((1, 2, 3), keepdim=True), image.std((1, 2, 3), keepdim=True)
        return super().forward((image - mean) / deviation)


def export(folder: Path, factory: str, *options: str) -> int:
    command = ["--factory", f"tests.export.test_extremes:{factory}", "--name", "my-net", "--input-size", "16"]
    command += ["--weights", "random", "--normalize", "none", "--precisions", "fp32", "--output", str(folder)]
    return main([*command, *options])


def test_a_model_that_gives_nan_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path, "Normalising") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "OUTPUTS ARE NOT FINITE for a black image, a white image, a grey image, a grey image again:" in printed
    assert not bundles.load(tmp_path / "my-net" / "1").allow_non_finite
    assert export(tmp_path, "Normalising", "--allow-non-finite") == 0
    assert "NOT FINITE" not in capsys.readouterr().out
    assert bundles.load(tmp_path / "my-net" / "2").allow_non_finite


def test_a_smaller_file_that_overflows_for_a_white_image_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As half precision does beyond 65,504 on processors that compute in it."""

    def overflowing(source: Path, target: Path) -> None:
        model = onnx.load(source)
        *others, softmax = model.graph.node
        assert softmax.op_type == "Softmax"
        constants = {
            "_axes": np.array([1, 2, 3]),
            "_column": np.array([-1, 1]),
            "_bright": np.array(254.9, np.float32),
        }
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
        more = [
            helper.make_node("Cast", ["image"], ["_pixels"], to=1),
            helper.make_node("ReduceMean", ["_pixels", "_axes"], ["_brightness"], keepdims=0),
            helper.make_node("Sub", ["_bright", "_brightness"], ["_below"]),
            helper.make_node("Sqrt", ["_below"], ["_root"]),
            helper.make_node("Reshape", ["_root", "_column"], ["_shift"]),
            helper.make_node("Add", [softmax.input[0], "_shift"], ["_shifted"]),  # changes no probability, or gives NaN
            helper.make_node("Softmax", ["_shifted"], softmax.output, axis=1),
        ]
        del model.graph.node[:]
        model.graph.node.extend([*others, *more])
        onnx.save(model, target)

    monkeypatch.setattr(precisions, "to_fp16", overflowing)
    request = ExportRequest(tmp_path, weights="random", precisions=(Precision.FP32, Precision.FP16))
    published = publish(small.classifier(), request, Sources(), Silent())
    assert [variant.precision for variant in published.bundle.variants] == [Precision.FP32]
    assert "not finite on uniform or extreme images" in published.left_out[0].reason
    assert not (published.folder / "model.fp16.onnx").exists()


@pytest.mark.parametrize(
    "entry", [small.classifier(), small.backbone(), small.segmenter(), small.forecaster(), small.sequence_model()]
)
def test_every_kind_of_input_has_extremes(entry: Entry) -> None:
    names, inputs = extremes(entry)
    assert {len(array) for array in inputs.values()} == {len(names)}
    assert len(set(names)) == len(names)
    answers = serving_graph(entry, entry.build()).reference(inputs)
    assert all(np.isfinite(answer).all() for answer in answers.values())
