"""fp16 and int8 files without labelled data: features and segmentation are compared with the fp32 file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from export import accuracy
from export.accuracy import Measured
from export.arrays import Array
from export.precisions import Judge
from export.samples import ImageData, ImageSet, noise_images
from models.entry import Entry, ImageInput
from rafaga.bundle import Precision, Variant
from rafaga.server.engines.runtimes import fastest_eligible
from tests.export import small
from tests.export.exporting import export, exported, traced_judge

INT8, SMALLER = (Precision.INT8,), (Precision.FP16, Precision.INT8)


class SmallEmbedding(nn.Module):
    """Mean colours of four regions, mixed by a dense layer: [N, 3, 16, 16] -> one output [N, 24] of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3 * 4, 24)

    def forward(self, image: Tensor) -> Tensor:
        return normalize(self.mix(adaptive_avg_pool2d(image, 2).flatten(1)))


def embedding() -> Entry:
    image, strides = small.small_image_input(), {"e": 0}
    return replace(small.backbone(), name="small-embedding", build=SmallEmbedding, input=image, strides=strides)


def photos(count: int, seed: int, size: int = 64) -> ImageSet:
    pixels = noise_images(count, (size, size), 3, np.random.default_rng(seed))
    return ImageSet(f"noise {seed}", np.full(count, -1), lambda rows: pixels[np.asarray(rows)])


@pytest.fixture(scope="module")
def judge_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Entry], Judge]:
    """Of weights that count as trained; each network is traced once."""
    made: dict[str, Judge] = {}

    def of(entry: Entry) -> Judge:
        if entry.name not in made:
            assert isinstance(entry.input, ImageInput)
            torch.manual_seed(0)
            size = entry.input.height or 64
            data = ImageData(photos(200, 1, size), photos(32, 2, size), photos(60, 3, size))
            made[entry.name] = traced_judge(entry, entry.build(), data, tmp_path_factory.mktemp(entry.name))
            assert made[entry.name].baseline == Measured(), "the fp32 file is the reference"
        return made[entry.name]

    return of


def figures(variant: Variant) -> dict[str, float]:
    return {metric.name: metric.value for metric in variant.metrics}


def test_recall_counts_the_nearest_others() -> None:
    """Six points on an arc: each one's two nearest are its neighbours; then the last moves to the front."""
    angles = np.array([0.0, 0.1, 0.21, 0.33, 0.46, 0.6])
    moved = np.array([0.0, 0.1, 0.21, 0.33, 0.46, -0.1])

    def on_arc(values: Array) -> Array:
        return np.stack([np.cos(values), np.sin(values)], axis=1)

    assert accuracy.recall(on_arc(angles), on_arc(angles), neighbours=2) == 1
    # By hand: 1, 2 and 3 keep both neighbours, 0 and 4 keep one, 5 keeps none.
    assert accuracy.recall(on_arc(moved), on_arc(angles), neighbours=2) == pytest.approx(8 / 12)


@pytest.mark.parametrize(
    ("entry", "metric", "allowed"),
    [
        (small.backbone(), "similarity", 0.01),
        (embedding(), "recall_at_10", 0.1),
        (small.segmenter(), "agreement", 0.01),
    ],
    ids=lambda value: value.name if isinstance(value, Entry) else str(value),
)
def test_each_task_has_its_criterion(
    entry: Entry, metric: str, allowed: float, judge_of: Callable[[Entry], Judge]
) -> None:
    variants, _ = judge_of(entry).variants(SMALLER)
    assert [v.precision for v in variants] == ["fp16", "int8"]
    for variant in variants:
        assert variant.loss is not None
        assert (variant.loss.metric, variant.loss.allowed_drop) == (metric, allowed)
        assert variant.loss.drop == pytest.approx(1 - figures(variant)[metric])
        assert variant.default_eligible == (figures(variant)[metric] >= 1 - allowed)
    half, eighth = variants
    assert half.default_eligible
    assert figures(half)[metric] >= figures(eighth)[metric]


def test_layers_return_to_float_until_the_limit_is_met(judge_of: Callable[[Entry], Judge]) -> None:
    """Limits: the default; one that the network misses as a whole and meets with one of two layers in float; zero."""
    judge = judge_of(small.backbone())
    (first,), _ = judge.variants(INT8)
    assert first.loss is not None
    assert first.float_layers == ()
    (int8,), _ = replace(judge, max_accuracy_drop=first.loss.drop * 0.8).variants(INT8)
    assert len(int8.float_layers) == 1
    assert figures(int8)["similarity"] > figures(first)["similarity"]
    (missed,), _ = replace(judge, max_accuracy_drop=0.0).variants(INT8)
    assert missed.loss is not None
    assert (missed.default_eligible, missed.loss.allowed_drop) == (False, 0)


def test_your_own_backbone_measured_on_too_few_photos(tmp_path: Path) -> None:
    """The figures are stored, and no server chooses by them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, pixels in enumerate(noise_images(24, (70, 90), 3, np.random.default_rng(3))):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    save_file(small.SmallBackbone().state_dict(), tmp_path / "w.safetensors")
    options = ["--task", "features", "--maps", "fine:2,coarse:8", "--precisions", "fp32,fp16,int8"]
    options += ["--weights", str(tmp_path / "w.safetensors"), "--eval-images", str(folder)]
    assert export(tmp_path, "small:SmallBackbone", *options, size="any", labels=None) == 0
    bundle = exported(tmp_path)
    assert [(feature.output, feature.stride) for feature in bundle.features] == [("fine", 2), ("coarse", 8)]
    assert bundle.inputs[0].shape == (None, None, None, 3)
    for variant in bundle.variants[1:]:
        similarity, channels = variant.metrics
        assert channels.name == "channels"
        assert (similarity.name, similarity.samples) == ("similarity", 15), "the others calibrate and choose"
        assert variant.loss is not None
        assert (variant.loss.within, variant.default_eligible) == (True, False)
    fast = tuple(msgspec.structs.replace(variant, cpu_speedup=3.0) for variant in bundle.variants)
    chosen, why = fastest_eligible(msgspec.structs.replace(bundle, variants=fast), quick_int8=True)
    assert chosen.precision is Precision.FP32
    assert "measured on too few samples (15)" in why
