"""The segmenter is torchvision's, without its auxiliary head, at any size."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.segmentation import fcn_resnet50

from models.segmentation import FcnResNet50
from models.zoo import catalogue
from tests.models.counting import on_meta


@pytest.mark.parametrize(("height", "width"), [(64, 96), (97, 131)])
def test_scores_are_torchvisions_for_every_pixel(height: int, width: int) -> None:
    torch.manual_seed(0)
    published = fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True).eval()
    module = FcnResNet50().eval()
    module.load_state_dict(published.state_dict())
    image = torch.randn(1, 3, height, width)
    with torch.inference_mode():
        (scores,) = module(image)
        assert torch.equal(scores, published(image)["out"])
    assert scores.shape == (1, 21, height, width)
    assert scores.std() > 0


def test_the_last_stages_are_dilated_instead_of_strided() -> None:
    module = on_meta(FcnResNet50)
    deepest = module.backbone(torch.zeros(1, 3, 64, 96, device="meta"))["out"]
    assert deepest.shape == (1, 2048, 64 // 8, 96 // 8)


def test_classes_are_those_of_pascal_voc_and_the_background() -> None:
    labels = catalogue()["fcn-resnet50"].labels()
    assert len(labels) == 21
    assert labels[0] == "__background__"
