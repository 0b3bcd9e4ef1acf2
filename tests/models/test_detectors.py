"""Detectors against torchvision's own, with the same random parameters."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection import FasterRCNN, ssd300_vgg16

from models.backbones import ResNet50Fpn
from models.detectors import CLASSES, FasterRcnn, Ssd300


def test_ssd_finds_the_boxes_of_torchvisions() -> None:
    torch.manual_seed(0)
    published = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES).eval()
    module = Ssd300().eval()
    module.load_state_dict(published.state_dict())
    photo = torch.rand(3, 300, 300)
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (published.transform.image_mean, published.transform.image_std)
    )
    with torch.inference_mode():
        (expected,) = published([photo])
        boxes, scores = module(((photo - mean) / std)[None].repeat(2, 1, 1, 1))
    assert (boxes.shape, scores.shape) == ((2, 8732, 4), (2, 8732, 91))
    assert len(expected["boxes"]) > 0
    for box, score, label in zip(expected["boxes"][:5], expected["scores"], expected["labels"], strict=False):
        nearest = (boxes[1] - box).abs().sum(1) + (scores[1, :, label] - score).abs()
        assert nearest.min() < 1e-2


def test_faster_rcnn_answers_as_torchvisions() -> None:
    torch.manual_seed(0)
    published = FasterRCNN(ResNet50Fpn().backbone, CLASSES, min_size=128, max_size=128, box_score_thresh=0.0).eval()
    module = FasterRcnn().eval()
    module.roi_heads.score_thresh = 0.0  # random parameters are sure of nothing
    module.load_state_dict(published.state_dict())
    photo = torch.rand(3, 128, 128)
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (published.transform.image_mean, published.transform.image_std)
    )
    with torch.inference_mode():
        (expected,) = published([photo])
        boxes, scores, labels = module(((photo - mean) / std)[None])
    n = len(expected["boxes"])
    assert n > 0
    assert (boxes.shape, scores.shape, labels.shape) == ((1, 100, 4), (1, 100), (1, 100))
    torch.testing.assert_close(boxes[0, :n], expected["boxes"], atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(scores[0, :n], expected["scores"], atol=1e-4, rtol=1e-4)
    assert labels[0, :n].tolist() == expected["labels"].tolist()


@pytest.mark.parametrize("build", [Ssd300, FasterRcnn])
def test_nothing_is_random_in_an_answer(build: type[Ssd300] | type[FasterRcnn]) -> None:
    module = build().eval()
    size = 300 if build is Ssd300 else 64
    image = torch.rand(1, 3, size, size)
    with torch.inference_mode():
        for first, second in zip(module(image), module(image), strict=True):
            assert torch.equal(first, second)
