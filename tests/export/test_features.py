"""fp16 and int8 files of feature extractors: nobody labels a map, so they are judged by likeness to the fp32 file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from export import accuracy
from export.__main__ import main
from export.evidence import ImageEvidence, Sources
from export.graph import serving_graph
from export.onnx import to_onnx
from export.precisions import Judge
from export.samples import ImageData, ImageSet, noise_images
from export.verify import ParityCase, open_session
from models.entry import Entry, ImageInput
from models.progress import Silent
from rafaga import bundle as bundles
from rafaga.bundle import Precision, Variant
from rafaga.server.repository.loader import fastest_eligible
from tests.export import small

INT8 = (Precision.INT8,)


class SmallEmbedding(nn.Module):
    """Mean colours of four regions, mixed by a dense layer: [N, 3, 16, 16] -> one output [N, 24] of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3 * 4, 24)

    def forward(self, image: Tensor) -> Tensor:
        return normalize(self.mix(nn.functional.adaptive_avg_pool2d(image, 2).flatten(1)))


def photos(count: int, seed: int, size: int = 64) -> ImageSet:
    pixels = noise_images(count, (size, size), 3, np.random.default_rng(seed))
    return ImageSet(f"noise {seed}", np.full(count, -1), lambda rows: pixels[np.asarray(rows)])


def judge_of(entry: Entry, folder: Path, max_drop: float | None = None) -> Judge:
    """Of weights that count as trained."""
    assert isinstance(entry.input, ImageInput)
    torch.manual_seed(0)
    graph = serving_graph(entry, entry.build())
    size = entry.input.height or 64
    evidence = ImageEvidence(
        entry, entry.input, ImageData(photos(200, 1, size), photos(32, 2, size), photos(60, 3, size)), Sources()
    )
    path = folder / "model.onnx"
    to_onnx(graph, evidence.example(), path)
    cases = [ParityCase(inputs, graph.reference(inputs)) for inputs in evidence.batches()]
    baseline = evidence.measure(open_session(path), lambda *_: None)
    assert baseline == (), "the fp32 file is what the others are compared with"
    return Judge(path, baseline, cases, evidence, trained=True, max_accuracy_drop=max_drop, steps=Silent())


def embedding() -> Entry:
    return replace(
        small.backbone(),
        name="small-embedding",
        build=SmallEmbedding,
        input=small.small_image_input(),
        strides={"e": 0},
    )


def figures(variant: Variant) -> dict[str, float]:
    return {metric.name: metric.value for metric in variant.metrics}


def test_a_file_is_like_itself(tmp_path: Path) -> None:
    session = open_session(judge_of(embedding(), tmp_path).fp32)
    found = {m.name: m for m in accuracy.resemble(session, session, photos(60, 1, 16), limit=20)}
    assert found["similarity"].value == pytest.approx(1)
    assert found["recall_at_10"].value == 1
    assert {m.samples for m in found.values()} == {20}


def test_recall_counts_the_nearest_others() -> None:
    """Six points on an arc: each one's two nearest are its neighbours; then the last moves to the front."""
    angles = np.array([0.0, 0.1, 0.21, 0.33, 0.46, 0.6])
    moved = np.array([0.0, 0.1, 0.21, 0.33, 0.46, -0.1])

    def on_arc(values: np.ndarray) -> np.ndarray:
        return np.stack([np.cos(values), np.sin(values)], axis=1)

    assert accuracy.recall(on_arc(angles), on_arc(angles), neighbours=2) == 1
    # By hand: 1, 2 and 3 keep both neighbours, 0 and 4 keep one, 5 keeps none.
    assert accuracy.recall(on_arc(moved), on_arc(angles), neighbours=2) == pytest.approx(8 / 12)


def test_maps_are_judged_by_their_similarity(tmp_path: Path) -> None:
    variants, _ = judge_of(small.backbone(), tmp_path).variants((Precision.FP16, Precision.INT8))
    assert [v.precision for v in variants] == ["fp16", "int8"]
    for variant in variants:
        assert variant.loss is not None
        assert (variant.loss.metric, variant.loss.allowed_drop) == ("similarity", 0.01)
        assert variant.loss.drop == pytest.approx(1 - figures(variant)["similarity"])
        assert variant.default_eligible
    half, eighth = variants
    assert figures(half)["similarity"] > figures(eighth)["similarity"] > 0.99


def test_embeddings_are_judged_by_their_neighbours(tmp_path: Path) -> None:
    (int8,), _ = judge_of(embedding(), tmp_path).variants(INT8)
    assert int8.loss is not None
    assert (int8.loss.metric, int8.loss.allowed_drop) == ("recall_at_10", 0.1)
    assert figures(int8).keys() == {"recall_at_10", "similarity"}
    assert int8.default_eligible == (figures(int8)["recall_at_10"] >= 0.9)


def test_segmenters_are_judged_by_the_class_of_every_pixel(tmp_path: Path) -> None:
    (half, eighth), _ = judge_of(small.segmenter(), tmp_path).variants((Precision.FP16, Precision.INT8))
    for variant in (half, eighth):
        assert variant.loss is not None
        assert (variant.loss.metric, variant.loss.allowed_drop) == ("agreement", 0.01)
        assert variant.loss.drop == pytest.approx(1 - figures(variant)["agreement"])
        assert variant.default_eligible == (figures(variant)["agreement"] >= 0.99)
    assert figures(half)["agreement"] > 0.99


def test_layers_go_back_to_float_until_the_maps_are_alike(tmp_path: Path) -> None:
    """A limit that the network misses as a whole and meets with one of its two layers in float."""
    whole, second = tmp_path / "whole", tmp_path / "second"
    whole.mkdir()
    second.mkdir()
    (first,), _ = judge_of(small.backbone(), whole).variants(INT8)
    assert first.loss is not None
    assert first.float_layers == ()
    (int8,), _ = judge_of(small.backbone(), second, max_drop=first.loss.drop * 0.8).variants(INT8)
    assert len(int8.float_layers) == 1
    assert figures(int8)["similarity"] > figures(first)["similarity"]


def test_what_is_not_alike_enough_is_not_chosen(tmp_path: Path) -> None:
    (int8,), _ = judge_of(small.backbone(), tmp_path, max_drop=0.0).variants(INT8)
    assert not int8.default_eligible
    assert int8.loss is not None
    assert int8.loss.allowed_drop == 0


def test_by_the_command(tmp_path: Path) -> None:
    """One's own trained backbone: measured on photos and stored; on so few that no server chooses by it."""
    photos_folder = tmp_path / "photos"
    photos_folder.mkdir()
    for number, pixels in enumerate(noise_images(24, (70, 90), 3, np.random.default_rng(3))):
        Image.fromarray(pixels).save(photos_folder / f"{number:02}.png")
    save_file(small.SmallBackbone().state_dict(), tmp_path / "w.safetensors")
    code = main(
        [
            *("--factory", "tests.export.small:SmallBackbone", "--name", "own", "--task", "features"),
            *("--maps", "fine:2,coarse:8", "--input-size", "any", "--weights", str(tmp_path / "w.safetensors")),
            *("--eval-images", str(photos_folder), "--output", str(tmp_path)),
        ]
    )
    assert code == 0
    bundle = bundles.load(tmp_path / "own" / "1")
    for variant in bundle.variants[1:]:
        (similarity,) = variant.metrics
        assert (similarity.name, similarity.samples) == ("similarity", 15), "others calibrate and choose"
        assert variant.loss is not None
        assert (variant.loss.within, variant.default_eligible) == (True, False)
    fast = tuple(replace_speed(variant, 3.0) for variant in bundle.variants)
    chosen, why = fastest_eligible(msgspec.structs.replace(bundle, variants=fast), quick_int8=True)
    assert chosen.precision is Precision.FP32
    assert "measured on too few samples (15)" in why


def replace_speed(variant: Variant, cpu_speedup: float) -> Variant:
    return msgspec.structs.replace(variant, cpu_speedup=cpu_speedup)
