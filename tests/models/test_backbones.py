"""Feature extractors: strides at awkward sizes, and that they are the published networks, cut open."""

from __future__ import annotations

import re

import pytest
import torch
import torchvision.models
from torch import nn

from models.backbones import GoogLeNetBackbone, ResNet50Backbone, ResNet50Fpn, VGG16Backbone, VGG16Embedding
from models.detectors import FasterRcnn
from models.entry import Task
from models.googlenet import GoogLeNetClassifier
from models.segmentation import FcnResNet50
from models.zoo import catalogue
from tests.models.counting import on_meta

CHANNELS = {
    "resnet50-backbone": [256, 512, 1024, 2048],
    "resnet50-fpn": [256] * 5,
    "vgg16-backbone": [256, 512, 512],
    "googlenet-backbone": [480, 832, 1024],
}
MAPS = [e for e in catalogue().values() if e.task is Task.FEATURES and e.input.height is None]


@pytest.mark.parametrize(("height", "width"), [(64, 96), (97, 130)])
@pytest.mark.parametrize("entry", MAPS, ids=lambda e: e.name)
def test_maps_have_their_strides_at_any_size(entry: object, height: int, width: int) -> None:
    module = on_meta(entry.build)
    maps = module(torch.zeros(2, 3, height, width, device="meta"))
    assert len(maps) == len(entry.strides)
    assert [m.shape[1] for m in maps] == CHANNELS[entry.name]
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


def test_googlenet_maps_end_in_the_classifier() -> None:
    published = GoogLeNetClassifier().eval()
    backbone = GoogLeNetBackbone().eval()
    backbone.load_state_dict(published.state_dict())
    image = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        maps = backbone(image)
        assert torch.allclose(published.fc(maps[-1].mean((2, 3))), published(image), atol=1e-4)


def published_vgg16() -> nn.Module:
    """Untrained, with activations that do not fade: torch's own initialisation loses a factor of 2.4 in every layer."""
    torch.manual_seed(0)
    module = torchvision.models.vgg16(init_weights=False).eval()
    with torch.inference_mode():
        for parameter in module.parameters():
            parameter.mul_(6**0.5)
    return module


def test_vgg_maps_are_the_activations_before_the_poolings() -> None:
    published, module = published_vgg16(), VGG16Backbone().eval()
    module.load_state_dict(published.state_dict(), assign=True)
    before_poolings = [i for i, layer in enumerate(published.features) if isinstance(layer, nn.MaxPool2d)][2:]
    assert before_poolings == [16, 23, 30]
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        for found, end in zip(module(image), before_poolings, strict=True):
            assert isinstance(published.features[end - 1], nn.ReLU)
            assert found.std() > 0.1
            assert torch.equal(found, published.features[:end](image))


def test_embeddings_are_fc7_scaled_to_length_one() -> None:
    published, module = published_vgg16(), VGG16Embedding().eval()
    module.load_state_dict(published.state_dict(), assign=True)
    fc7: list[torch.Tensor] = []
    published.classifier[4].register_forward_hook(lambda *args: fc7.append(args[2]))
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        (embedding,) = module(images)
        published(images)
    assert embedding.shape == (2, 4096)
    assert torch.allclose(embedding.norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.allclose(embedding, fc7[0] / fc7[0].norm(dim=1, keepdim=True), atol=1e-6)
    assert (embedding[0] - embedding[1]).norm() > 0.01  # or anything would do


def test_the_pyramid_is_the_detectors_own() -> None:
    assert not any(m.training for m in ResNet50Fpn().eval().modules())
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    state = detector.state_dict()
    names = {k for k in ResNet50Fpn().state_dict() if "num_batches_tracked" not in k}
    # An untrained detector has ordinary batch normalisation; the frozen one has the same keys but the counters.
    assert names == {k for k in state if k.startswith("backbone.") and "num_batches_tracked" not in k}


def published_faster_rcnn() -> nn.Module:
    return torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)


@pytest.mark.parametrize(
    ("ours", "published"),
    [
        (GoogLeNetClassifier, lambda: torchvision.models.googlenet(init_weights=False)),
        (GoogLeNetBackbone, lambda: torchvision.models.googlenet(init_weights=False)),
        (ResNet50Backbone, torchvision.models.resnet50),
        (ResNet50Fpn, published_faster_rcnn),
        (FasterRcnn, published_faster_rcnn),
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


@pytest.mark.parametrize("ours", [ResNet50Fpn, FasterRcnn])
def test_the_published_detectors_old_names_are_understood(ours: type[nn.Module]) -> None:
    """The file is of 2019, before torchvision wrapped the convolutions of pyramid and proposals one level deeper, and
    with batch normalisation frozen, which counts no batches."""
    state = {}
    for key, tensor in on_meta(published_faster_rcnn).state_dict().items():
        if not key.endswith("num_batches_tracked"):
            renamed = re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0\.", r"\1.\2.", key)
            state[renamed.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = tensor
    assert {"backbone.fpn.inner_blocks.0.weight", "rpn.head.conv.weight"} <= state.keys()
    on_meta(ours).load_state_dict(state, strict=True, assign=True)
