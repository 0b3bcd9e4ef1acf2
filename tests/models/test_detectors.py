"""Detectors answer as torchvision's own do, with the same random parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, ssd300_vgg16

from export.graph import ServingGraph, settle
from export.settling import settle_detector
from models.backbones import ResNet50Fpn
from models.detectors import CLASSES, FasterRcnn, Ssd300
from models.suppression import best_objects, surest


def assert_same_objects(module: nn.Module, published: nn.Module, photos: Tensor) -> None:
    """Random parameters in both, settled so that they find something and not everything."""
    transform = published.get_submodule("transform")
    mean, std = (torch.tensor(x)[:, None, None] for x in (transform.image_mean, transform.image_std))
    inputs = (photos - mean) / std
    graph = ServingGraph(module, ("image",), ("boxes", "scores", "labels"), {})
    settle(graph, {"image": inputs.numpy()})
    settle_detector(graph, {"image": inputs.numpy()})
    published.load_state_dict(module.state_dict())
    with torch.inference_mode():
        answers = published(list(photos))
        boxes, scores, labels = module(inputs)
    assert boxes.shape == (len(photos), scores.shape[1], 4)
    assert scores.shape == labels.shape
    for row, expected in enumerate(answers):
        n = len(expected["boxes"])
        assert n > 0
        torch.testing.assert_close(boxes[row, :n], expected["boxes"], atol=2e-2, rtol=1e-4)
        torch.testing.assert_close(scores[row, :n], expected["scores"], atol=1e-4, rtol=1e-4)
        assert labels[row, :n].tolist() == expected["labels"].tolist()
        assert not any(rest[row, n:].any() for rest in (boxes, scores, labels))


@pytest.mark.nightly
def test_ssd_answers_as_torchvisions() -> None:
    """Scores of every box, the best of each class, suppression, the best of all classes."""
    torch.manual_seed(0)
    published = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES).eval()
    assert_same_objects(Ssd300().eval(), published, torch.rand(2, 3, 300, 300))


@pytest.mark.parametrize(("height", "width"), [(97, 131), pytest.param(128, 128, marks=pytest.mark.nightly)])
def test_faster_rcnn_answers_as_torchvisions(height: int, width: int) -> None:
    """Padding, anchors, proposals, pooling from four levels, suppression."""
    torch.manual_seed(0)
    sizes = {"min_size": min(height, width), "max_size": max(height, width)}
    published = FasterRCNN(ResNet50Fpn().backbone, CLASSES, **sizes).eval()
    assert_same_objects(FasterRcnn().eval(), published, torch.rand(1, 3, height, width).repeat(2, 1, 1, 1))


def test_suppression_keeps_the_surest_of_each_place_in_every_row() -> None:
    """Of three boxes in one place the surest stays, one elsewhere stays, one below the threshold goes."""
    here, there = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]
    boxes = torch.tensor([[here, here, here, there, there], [there, here, there, here, here]])
    scores = torch.tensor([[0.5, 0.9, 0.6, 0.3, 0.1], [0.2, 0.0, 0.0, 0.05, 0.1]])
    kept = surest(boxes, scores, 0.5, 0.1)
    torch.testing.assert_close(kept, torch.tensor([[0, 0.9, 0, 0.3, 0], [0.2, 0, 0, 0, 0]]))


def test_the_best_of_all_classes() -> None:
    """Two classes of two boxes each; one image with three objects and one with none."""
    boxes = torch.arange(1.0, 33.0).reshape(2, 2, 2, 4)
    scores = torch.tensor([[[0.2, 0.9], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    found, best, labels = best_objects(boxes, scores, 4)
    assert labels.tolist() == [[1, 2, 1, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(best[0], torch.tensor([0.9, 0.5, 0.2, 0.0]))
    torch.testing.assert_close(found[0, :3], torch.stack([boxes[0, 0, 1], boxes[0, 1, 0], boxes[0, 0, 0]]))
    assert not found[0, 3].any()
    assert not found[1].any()
