"""Feature extractors: strides at awkward sizes, and that they are the published networks, cut open."""

from __future__ import annotations

import pytest
import torch
import torchvision.models
from torch import nn

from models.backbones import GoogLeNetBackbone, ResNet50Backbone, ResNet50Fpn, VGG16Backbone, VGG16Embedding
from models.entry import Task
from models.googlenet import GoogLeNetClassifier
from models.segmentation import FcnResNet50
from models.zoo import catalogue
from tests.models.counting import on_meta

MAPS = [e for e in catalogue().values() if e.task is Task.FEATURES and e.input.height is None]


@pytest.mark.parametrize(("height", "width"), [(64, 96), (97, 130)])
@pytest.mark.parametrize("entry", MAPS, ids=lambda e: e.name)
def test_maps_have_their_strides_at_any_size(entry: object, height: int, width: int) -> None:
    module = on_meta(entry.build)
    maps = module(torch.zeros(2, 3, height, width, device="meta"))
    assert len(maps) == len(entry.strides)
    for found, stride in zip(maps, entry.strides.values(), strict=True):
        for size, pixels in zip(found.shape[2:], (height, width), strict=True):
            assert pixels // stride <= size <= -(-pixels // stride)


def test_resnet_maps_end_in_the_classifier() -> None:
    published = torchvision.models.resnet50().eval()
    backbone = ResNet50Backbone().eval()
    backbone.load_state_dict(published.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        maps = backbone(image)
        assert torch.allclose(published.fc(maps[-1].mean((2, 3))), published(image), atol=1e-4)
    assert [m.shape[1] for m in maps] == [256, 512, 1024, 2048]


def test_googlenet_maps_end_in_the_classifier() -> None:
    published = GoogLeNetClassifier().eval()
    backbone = GoogLeNetBackbone().eval()
    backbone.load_state_dict(published.state_dict())
    image = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        maps = backbone(image)
        assert torch.allclose(published.fc(maps[-1].mean((2, 3))), published(image), atol=1e-4)
    assert [m.shape[1] for m in maps] == [480, 832, 1024]


def test_vgg_maps_are_the_activations_before_the_poolings() -> None:
    module = VGG16Backbone().eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        *_, conv4_3, conv5_3 = module(image)
        assert torch.allclose(module.features[23:30](conv4_3), conv5_3)
        assert torch.allclose(module.features[:30](image), conv5_3, atol=1e-5)


def test_embeddings_have_length_one() -> None:
    module = VGG16Embedding().eval()
    with torch.inference_mode():
        (embedding,) = module(torch.rand(2, 3, 224, 224))
    assert embedding.shape == (2, 4096)
    assert torch.allclose(embedding.norm(dim=1), torch.ones(2), atol=1e-5)


def test_the_pyramid_is_the_detectors_own() -> None:
    assert not any(m.training for m in ResNet50Fpn().eval().modules())
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    state = detector.state_dict()
    names = {k for k in ResNet50Fpn().state_dict() if "num_batches_tracked" not in k}
    # An untrained detector has ordinary batch normalisation; the frozen one has the same keys but the counters.
    assert names == {k for k in state if k.startswith("backbone.") and "num_batches_tracked" not in k}


@pytest.mark.parametrize(
    ("ours", "published"),
    [
        (GoogLeNetClassifier, lambda: torchvision.models.googlenet(init_weights=False)),
        (GoogLeNetBackbone, lambda: torchvision.models.googlenet(init_weights=False)),
        (ResNet50Backbone, torchvision.models.resnet50),
        (VGG16Backbone, lambda: torchvision.models.vgg16(init_weights=False)),
        (VGG16Embedding, lambda: torchvision.models.vgg16(init_weights=False)),
        (
            FcnResNet50,
            lambda: torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True),
        ),
    ],
)
def test_published_state_dicts_load_unmodified(ours: type[nn.Module], published: object) -> None:
    module, state = on_meta(ours), on_meta(published).state_dict()
    size = len(state)
    module.load_state_dict(state, strict=True, assign=True)
    assert len(state) == size
    del state[next(iter(module.state_dict()))]
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(state, strict=True, assign=True)
