"""Detectors against torchvision's own, with the same random parameters."""

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


def normalised(photo: Tensor, detector: nn.Module) -> Tensor:
    """[1, 3, H, W], as the detector's own transform does it."""
    transform = detector.transform
    mean, std = (torch.tensor(x)[:, None, None] for x in (transform.image_mean, transform.image_std))
    return ((photo - mean) / std)[None]


def settled(module: nn.Module, inputs: Tensor) -> None:
    """Random parameters that find something, and not everything."""
    graph = ServingGraph(module, ("image",), ("boxes", "scores", "labels"), {})
    settle(graph, {"image": inputs.numpy()})
    settle_detector(graph, {"image": inputs.numpy()})


def assert_same_objects(found: tuple[Tensor, Tensor, Tensor], row: int, expected: dict[str, Tensor]) -> None:
    boxes, scores, labels = (part[row] for part in found)
    n = len(expected["boxes"])
    assert n > 0
    torch.testing.assert_close(boxes[:n], expected["boxes"], atol=2e-2, rtol=1e-4)
    torch.testing.assert_close(scores[:n], expected["scores"], atol=1e-4, rtol=1e-4)
    assert labels[:n].tolist() == expected["labels"].tolist()
    for rest in (boxes[n:], scores[n:], labels[n:]):
        assert not rest.any()


def test_ssd_answers_as_torchvisions() -> None:
    """All of torchvision's way: scores of every box, the best of each class, suppression, the best of all."""
    torch.manual_seed(0)
    module = Ssd300().eval()
    photos = torch.rand(2, 3, 300, 300)
    published = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES).eval()
    inputs = torch.cat([normalised(photo, published) for photo in photos])
    settled(module, inputs)
    published.load_state_dict(module.state_dict())
    with torch.inference_mode():
        expected = published(list(photos))
        found = module(inputs)
    assert [part.shape for part in found] == [(2, 200, 4), (2, 200), (2, 200)]
    for row in range(2):
        assert_same_objects(found, row, expected[row])


@pytest.mark.parametrize(("height", "width"), [(128, 128), (97, 131)])
def test_faster_rcnn_answers_as_torchvisions(height: int, width: int) -> None:
    """All of torchvision's way: padding, anchors, proposals, pooling from four levels, suppression."""
    torch.manual_seed(0)
    module = FasterRcnn().eval()
    photo = torch.rand(3, height, width)
    published = FasterRCNN(
        ResNet50Fpn().backbone, CLASSES, min_size=min(height, width), max_size=max(height, width)
    ).eval()
    inputs = normalised(photo, published)
    settled(module, inputs)
    published.load_state_dict(module.state_dict())
    with torch.inference_mode():
        (expected,) = published([photo])
        found = module(inputs.repeat(2, 1, 1, 1))
    assert [part.shape for part in found] == [(2, 100, 4), (2, 100), (2, 100)]
    for row in range(2):
        assert_same_objects(found, row, expected)


def test_suppression_keeps_places() -> None:
    """Of three boxes on one spot the surest stays; one apart stays; one below the threshold goes. Rows are apart."""
    spot, apart = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]
    boxes = torch.tensor([[spot, spot, spot, apart, apart], [apart, spot, apart, spot, spot]])
    scores = torch.tensor([[0.5, 0.9, 0.6, 0.3, 0.1], [0.2, 0.0, 0.0, 0.05, 0.1]])
    kept = surest(boxes, scores, 0.5, 0.1)
    torch.testing.assert_close(kept, torch.tensor([[0, 0.9, 0, 0.3, 0], [0.2, 0, 0, 0, 0]]))


def test_the_best_of_all_classes() -> None:
    """Two classes of two boxes each, one image with three objects and one with none."""
    boxes = torch.arange(1.0, 33.0).reshape(2, 2, 2, 4)
    scores = torch.tensor([[[0.2, 0.9], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    found, best, labels = best_objects(boxes, scores, 4)
    assert labels.tolist() == [[1, 2, 1, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(best[0], torch.tensor([0.9, 0.5, 0.2, 0.0]))
    torch.testing.assert_close(found[0, :3], torch.stack([boxes[0, 0, 1], boxes[0, 1, 0], boxes[0, 0, 0]]))
    assert not found[0, 3].any()
    assert not found[1].any()


@pytest.mark.parametrize("build", [Ssd300, FasterRcnn])
def test_nothing_is_random_in_an_answer(build: type[Ssd300] | type[FasterRcnn]) -> None:
    module = build().eval()
    size = 300 if build is Ssd300 else 64
    image = torch.rand(1, 3, size, size)
    with torch.inference_mode():
        for first, second in zip(module(image), module(image), strict=True):
            assert torch.equal(first, second)
