"""Uniform, extreme and repeated inputs are part of the proof; NaN for them is warned about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

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


class Loud(small.SmallClassifier):
    """Beyond the largest number of half precision for a white image."""

    def forward(self, image: Tensor) -> Tensor:
        loud = (300 * image.mean((1, 2, 3))[:, None]) ** 2
        return super().forward(image) + 1e-5 * loud


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


def test_half_precision_that_overflows_for_a_white_image_is_left_out(tmp_path: Path) -> None:
    entry = small.classifier()
    request = ExportRequest(tmp_path, weights="random", precisions=(Precision.FP32, Precision.FP16))
    plain = replace(small.small_image_input(), mean=(0.0,) * 3, std=(1.0,) * 3)
    published = publish(replace(entry, build=Loud, input=plain), request, Sources(), Silent())
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
