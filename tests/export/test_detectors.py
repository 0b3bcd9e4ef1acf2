"""Your own detectors, of each of torchvision's families: exported, proven against torchvision's own forward, served."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import MultiScaleRoIAlign

from export.detectors import require_same_objects
from export.graph import ServingGraph, serving_graph, settle
from export.labels import Labels, default_labels
from export.own import OwnModel, OwnModelInvalid, assumptions, own_entry
from export.samples import noise_images
from export.settling import settle_detector
from models.detectors import Detector, batched
from models.entry import ImageInput
from rafaga import Client
from rafaga.bundle import DetectionSpec, Task
from tests.export.exporting import export, exported, said
from tests.export.test_own import own
from tests.integration.serving import serving

THINGS = ("car", "dog", "tree")
SIZES: dict[str, Any] = {"min_size": 64, "max_size": 96}


class Pyramid(nn.Module):
    """Two maps of 32 channels, strides 8 and 16."""

    out_channels: Any = 32

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 5, stride=4, padding=2)
        self.fine = nn.Conv2d(8, 32, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(32, 32, 3, stride=2, padding=1)

    def forward(self, image: Tensor) -> Any:
        fine = self.fine(self.first(image).relu()).relu()
        return OrderedDict(fine=fine, coarse=self.coarse(fine))


class OneMap(Pyramid):
    def forward(self, image: Tensor) -> Any:
        return super().forward(image)["fine"]


class TwoSizes(Pyramid):
    out_channels = (32, 32)


def anchors(*sizes: tuple[int, ...]) -> AnchorGenerator:
    return AnchorGenerator(sizes, ((0.5, 1.0),) * len(sizes))


BOXES = DefaultBoxGenerator([[2], [2, 3]], scales=[0.2, 0.5, 0.8])


def ssd() -> nn.Module:
    return SSD(TwoSizes(), BOXES, (96, 64), 4, detections_per_img=20, topk_candidates=50)


def ssdlite() -> nn.Module:
    head = SSDLiteHead([32, 32], BOXES.num_anchors_per_location(), 4, nn.BatchNorm2d)
    return SSD(TwoSizes(), BOXES, (96, 64), 4, head=head, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def retinanet() -> nn.Module:
    limits = {"topk_candidates": 60, "detections_per_img": 25, "score_thresh": 0.1}
    return RetinaNet(Pyramid(), 4, anchor_generator=anchors((16, 20), (32, 40)), **limits, **SIZES)


def fcos() -> nn.Module:
    return FCOS(Pyramid(), 4, anchor_generator=AnchorGenerator(((8,), (16,)), ((1.0,),) * 2), **SIZES)


def faster_rcnn() -> nn.Module:
    few: dict[str, Any] = {"rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_test": 50, "box_detections_per_img": 30}
    pool = MultiScaleRoIAlign(["fine", "coarse"], output_size=(5, 3), sampling_ratio=-1, canonical_scale=32)
    head, predictor = TwoMLPHead(32 * 15, 16), FastRCNNPredictor(16, 4)
    parts: dict[str, Any] = {"box_roi_pool": pool, "box_head": head, "box_predictor": predictor}
    return FasterRCNN(Pyramid(), rpn_anchor_generator=anchors((16,), (32,)), **parts, **few, **SIZES)


def faster_rcnn_of_one_map() -> nn.Module:
    pool = MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=2)
    few: dict[str, Any] = {"rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_test": 30, "rpn_score_thresh": 0.1}
    return FasterRCNN(OneMap(), 3, rpn_anchor_generator=anchors((16, 32)), box_roi_pool=pool, **few, **SIZES)


class Twice(RetinaNet):
    """Its own post-processing: all scores are halved."""

    def postprocess_detections(self, *given: Any) -> Any:
        return [{**found, "scores": found["scores"] / 2} for found in super().postprocess_detections(*given)]


def twice() -> nn.Module:
    return Twice(Pyramid(), 4, anchor_generator=anchors((16, 20), (32, 40)), **SIZES)


def masks() -> nn.Module:
    pool = MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=2)
    return MaskRCNN(OneMap(), 3, rpn_anchor_generator=anchors((16,)), box_roi_pool=pool, mask_roi_pool=pool)


FAMILIES = {f.__name__: f for f in (ssd, ssdlite, retinanet, fcos, faster_rcnn, faster_rcnn_of_one_map)}


def export_detector(folder: Path, family: str, *options: str, labels: tuple[str, ...] | None = None) -> int:
    return export(folder, f"test_detectors:{family}", "--task", "detection", *options, size=None, labels=labels)


def settled(family: str) -> tuple[ServingGraph, dict[str, np.ndarray]]:
    """With random weights that find some things in the images, which are noise."""
    torch.manual_seed(5)
    model = batched(FAMILIES[family]())
    graph = serving_graph(own_entry(described(family)), model)
    images = {"image": noise_images(8, (64, 96), 3, np.random.default_rng(0))}
    settle(graph, images)
    settle_detector(graph, images)
    return graph, images


def described(family: str, labels: tuple[str, ...] | None = None, **changes: Any) -> OwnModel:
    factory = f"tests.export.test_detectors:{family}"
    named = Labels(labels) if labels else None
    return own(task=Task.DETECTION, size=None, factory=factory, labels=named, **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_torchvisions_objects(family: str) -> None:
    graph, images = settled(family)
    scores = graph.reference(images)["scores"]
    assert (scores > 0).any(axis=1).sum() >= 4
    require_same_objects(graph, images)


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family == "ssdlite" else pytest.mark.nightly) for family in FAMILIES]
)
def test_a_detector_finds_what_torchvisions_does(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With weights of a file. The export has compared with torchvision's forward; so does this, of what is served."""
    model = settled(family)[0].module.model
    assert isinstance(model, Detector)
    detector = model.original[0]
    torch.save(detector.state_dict(), tmp_path / f"{family}.pth")
    things = THINGS[: 2 if family == "faster_rcnn_of_one_map" else 3]
    options = ["--weights", str(tmp_path / f"{family}.pth")]
    assert export_detector(tmp_path, family, *options, labels=things) == 0, said(capsys)
    bundle = exported(tmp_path)
    assert bundle.labels[:3] == ("__background__", "car", "dog")
    photo = noise_images(1, (64, 96), 3, np.random.default_rng(9))[0]
    with torch.inference_mode():
        (expected,) = detector([torch.from_numpy(photo).permute(2, 0, 1) / 255])
    with serving(tmp_path / "repository") as served, Client(served.address) as client:
        found = client.detect(photo, model=bundle.name)
    assert len(found) == len(expected["scores"]) > 0
    assert [o.score for o in found] == pytest.approx(expected["scores"].tolist(), abs=1e-4)
    assert [bundle.labels.index(o.label) for o in found] == expected["labels"].tolist()
    corners = [[o.box.x_min, o.box.y_min, o.box.x_max, o.box.y_max] for o in found]
    np.testing.assert_allclose(corners, expected["boxes"], atol=1e-2)


def test_random_weights_find_some_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_detector(tmp_path, "ssd") == 0
    bundle = exported(tmp_path)
    assert bundle.labels == ("0", "1", "2", "3")
    assert bundle.detection == DetectionSpec(max_objects=20, score_threshold=0.01, iou_threshold=0.45)
    assert "size, interpolation and pixels: the detector's own transform" in said(capsys)


@pytest.mark.parametrize(
    ("family", "weights", "message"),
    [
        ("twice", "random", "Twice gives other objects than torchvision's post-processing"),
        ("retinanet", "factory", "nothing is found in the images of the checks"),  # as built, all is background
    ],
)
def test_other_objects_or_none_are_refused(
    family: str, weights: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export_detector(tmp_path, family, "--weights", weights) == 1
    assert message in said(capsys)


def test_the_module_describes_its_images() -> None:
    half = (0.5, 0.5, 0.5)
    assert own_entry(described("ssdlite", bgr=True)).input == ImageInput(64, 96, 3, half, half, bgr=True)
    fcos = own_entry(described("fcos", THINGS, exif_orientation=False))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert fcos.input == ImageInput(None, None, 3, mean, std, 64, 96, exif_orientation=False)
    size = assumptions(fcos, fcos.labels(), named=True)[0]
    assert size.endswith("RGB of an image whose shorter side is resized to 64 (bilinear) and the longer at most 96")


@pytest.mark.parametrize(
    ("family", "labels", "message"),
    [
        ("masks", THINGS[:2], "--task detection: it also gives masks or keypoints, which are not served"),
        ("retinanet", THINGS[:2], "2 labels, but 4 classes with the background: give --labels with 3 names, or 4"),
    ],
)
def test_a_detector_that_cannot_be_taken(family: str, labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(OwnModelInvalid, match=message):
        own_entry(described(family, labels))


def test_cocos_names_of_torchvisions_own() -> None:
    assert default_labels(retinanet(), 91)[:2] == ("__background__", "person")
