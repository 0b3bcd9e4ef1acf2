"""Images are prepared as the published weights' metadata say; a wrong preparation is warned about."""

from __future__ import annotations

import hashlib
import io
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import SqueezeNet1_1_Weights, ViT_B_16_Weights

from export.graph import serving_graph
from export.own import OwnModel, OwnModelInvalid, assumptions, own_entry
from export.samples import preparation
from models.entry import Entry, ImageInput
from rafaga import images
from rafaga.bundle import Interpolation, Task
from tests.export import small
from tests.export.exporting import export, exported, said, write_photos
from tests.export.test_own import own


def of_torchvision(name: str, **changes: Any) -> OwnModel:
    return own(factory=f"torchvision.models:{name}", **({"size": None, "labels": None} | changes))


def image_of(entry: Entry) -> ImageInput:
    assert isinstance(entry.input, ImageInput)
    return entry.input


@pytest.mark.parametrize("size", [None, (224, 224)])
def test_a_torchvision_builder_is_served_with_its_own_transform(size: tuple[int, int] | None) -> None:
    """SqueezeNet, without --resize-shorter: cropped as in torchvision, not squashed."""
    entry = own_entry(of_torchvision("squeezenet1_1", size=size))
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = SqueezeNet1_1_Weights.DEFAULT.transforms()(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    served = images.prepare(buffer.getvalue(), preparation(image_of(entry)), 10**7).pixels.copy()
    graph = serving_graph(entry, torch.nn.Identity()).module
    found = graph.normalised(torch.from_numpy(served[None]))[0]  # type: ignore[operator]
    assert float((found - expected).abs().max()) < 0.02, "one level of 255"
    assert float((found - expected).abs().mean()) < 1e-4
    assert "torchvision's SqueezeNet1_1_Weights.IMAGENET1K_V1" in assumptions(entry, (), named=True)[2]


def test_size_and_interpolation_are_those_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bicubic = image_of(own_entry(of_torchvision("efficientnet_b3")))
    assert (bicubic.height, bicubic.resize_shorter, bicubic.interpolation) == (300, 320, Interpolation.BICUBIC)
    assert image_of(own_entry(of_torchvision("googlenet"))).mean == (0.5, 0.5, 0.5)
    assert image_of(own_entry(of_torchvision("vit_b_16"))).height == 224
    published = tmp_path / ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.url.rpartition("/")[2]
    published.write_bytes(b"weights")
    swag = image_of(own_entry(of_torchvision("vit_b_16", weights=str(published))))
    assert (swag.height, swag.resize_shorter, swag.interpolation) == (384, 384, Interpolation.BICUBIC)
    mine = published.rename(tmp_path / "mine.pth")  # not the published bytes: torchvision's default
    assert image_of(own_entry(of_torchvision("vit_b_16", weights=str(mine)))).height == 224
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr("export.preprocessing.sha256_of", lambda _: "9ac1b537" + digest[8:])  # as if they were
    assert image_of(own_entry(of_torchvision("vit_b_16", weights=str(mine)))).height == 384


def test_options_win_over_the_metadata() -> None:
    squashed = image_of(own_entry(of_torchvision("squeezenet1_1", resize_shorter=0)))
    assert (squashed.height, squashed.resize_shorter) == (224, None)
    smaller = image_of(own_entry(of_torchvision("squeezenet1_1", size=(128, 128))))
    assert (smaller.height, smaller.resize_shorter) == (128, 146)
    plain = image_of(own_entry(of_torchvision("squeezenet1_1", normalize="none", interpolation=Interpolation.NEAREST)))
    assert (plain.mean, plain.interpolation) == ((0.0, 0.0, 0.0), Interpolation.NEAREST)
    segmenter = own(factory="torchvision.models.segmentation:fcn_resnet50", task=Task.SEGMENTATION, size=None)
    assert image_of(own_entry(segmenter)).resize_shorter == 520
    with pytest.raises(OwnModelInvalid, match="a fixed --input-size"):
        own_entry(of_torchvision("SqueezeNet"))


def test_a_timm_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = {"mean": (0.5, 0.5, 0.5), "std": (0.4, 0.4, 0.4), "interpolation": "bicubic"}
    config = SimpleNamespace(input_size=(3, 224, 224), crop_pct=0.875, crop_mode="center", **pixels)

    def little_net() -> torch.nn.Module:
        return small.SmallClassifier()

    little_net.__module__ = "timm.models.little"
    timm, models, little = (types.ModuleType(name) for name in ("timm", "timm.models", "timm.models.little"))
    models.get_pretrained_cfg = {"little_net": config}.get  # type: ignore[attr-defined]
    little.little_net = little_net  # type: ignore[attr-defined]
    for module in (timm, models, little):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    entry = own_entry(own(factory="timm.models.little:little_net", size=None))
    mean, std = (0.5,) * 3, (0.4,) * 3
    assert entry.input == ImageInput(224, 224, 3, mean, std, 256, interpolation=Interpolation.BICUBIC)
    assert entry.prepared_as == "timm's configuration of little_net"


def test_channels_in_reverse_order() -> None:
    pixels = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8)
    ordinary, reverse = (
        serving_graph(own_entry(own(normalize="none", bgr=bgr)), torch.nn.Identity()).module for bgr in (False, True)
    )
    torch.testing.assert_close(
        reverse.normalised(pixels),  # type: ignore[operator]
        ordinary.normalised(pixels).flip(1),  # type: ignore[operator]
    )
    with pytest.raises(OwnModelInvalid, match="--layout bgr is for 3 channels"):
        own_entry(own(channels=1, bgr=True))


def test_bicubic_and_a_model_that_guesses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels in another order than the outputs: every answer is wrong."""
    torch.manual_seed(0)
    model = small.SmallClassifier()
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.weight[0] += 1  # always alpha, more or less surely
        model.output.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    photos = write_photos(tmp_path / "photos", [f"{small.CLASSES[1 + number % 2]}_{number}" for number in range(16)])
    options = ["--weights", str(tmp_path / "w.pth"), "--interpolation", "bicubic", "--layout", "bgr"]
    options += ["--eval-images", str(photos), "--classes-from", "file"]
    assert export(tmp_path, "small:SmallClassifier", *options) == 0
    printed = said(capsys)
    assert "TOP-1 IS AT CHANCE: 0.00 % of 10 samples" in printed
    assert "labels in another order than the model's outputs" in printed
    assert "input: 16 x 16 BGR, resized to it without cropping (bicubic)" in printed
    image = exported(tmp_path).image
    assert image is not None
    assert image.interpolation is Interpolation.BICUBIC
