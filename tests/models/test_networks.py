"""Networks: sizes and costs as in the papers, and the answers of the published networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import GoogLeNet_Weights
from torchvision.models.detection import FasterRCNN, ssd300_vgg16
from torchvision.models.segmentation import fcn_resnet50

from export.graph import ServingGraph, settle
from export.settling import settle_detector
from models.backbones import GoogLeNetBackbone, ResNet50Backbone, ResNet50Fpn, VGG16Backbone, VGG16Embedding
from models.cifar_resnet import Block, CifarConfig, CifarResNet
from models.detectors import CLASSES, faster_rcnn, ssd300
from models.entry import ImageInput
from models.googlenet import GoogLeNetClassifier, NaiveInception
from models.lenet import LeNet5
from models.plain import PlainBlock
from models.segmentation import FcnResNet50
from models.suppression import best_objects, surest
from models.zoo import catalogue


def on_meta(build: Callable[[], nn.Module]) -> Any:
    """The module without storage: gives shapes and costs at once. `Any`, because torch types attributes loosely."""
    with torch.device("meta"):
        return build().eval()


def multiply_adds(module: nn.Module, *shape: int) -> int:
    """Of all convolutions and dense layers, for one input of `shape` (without the batch)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, *shape, device="meta"))
    return counter.get_total_flops() // 2


PARAMETERS = {
    "lenet5-mnist": 61_706,
    "cnn-mnist": 3_241_354,
    "resnet20-cifar10": 269_722,
    "plain20-cifar10": 269_722,
    "resnet56-cifar10": 853_018,
    "plain56-cifar10": 853_018,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "plain34": 21_623_848,  # ResNet-34 without the convolutions of its shortcuts
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "googlenet": 6_624_904,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_input(name: str) -> None:
    entry = catalogue()[name]
    assert sum(p.numel() for p in on_meta(entry.build).parameters()) == PARAMETERS[name]
    assert isinstance(entry.input, ImageInput)
    if entry.dataset == "ImageNet-1k":
        assert (entry.input.height, entry.input.width, entry.input.channels) == (224, 224, 3)


@pytest.mark.parametrize(("name", "billions"), [("plain34", 3.6), ("vgg19", 19.6), ("googlenet", 1.5)])
def test_multiply_adds_are_those_of_the_papers(name: str, billions: float) -> None:
    assert multiply_adds(on_meta(catalogue()[name].build), 3, 224, 224) == pytest.approx(1e9 * billions, rel=0.03)


def test_lenet5_is_its_layers_in_order_on_padded_digits() -> None:
    torch.manual_seed(0)
    m = LeNet5().eval()
    in_order = nn.Sequential(
        nn.ZeroPad2d(2), m.c1, nn.Tanh(), nn.AvgPool2d(2, 2), m.c3, nn.Tanh(), nn.AvgPool2d(2, 2),
        m.c5, nn.Tanh(), nn.Flatten(), m.f6, nn.Tanh(), m.output,
    )  # fmt: skip
    digits = torch.rand(3, 1, 28, 28)
    assert torch.equal(m(digits), in_order(digits))


def test_cifar_shortcuts_carry_every_second_pixel_and_add_channels_of_zeros() -> None:
    block = CifarResNet(CifarConfig(20, residual=True)).eval().stage2[0]
    assert isinstance(block, Block)
    nn.init.zeros_(block.bn2.weight)  # the residual branch gives nothing
    x = torch.rand(2, 16, 32, 32)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_cifar_depth_must_be_6n_plus_2() -> None:
    with pytest.raises(ValueError, match="6n"):
        CifarResNet(CifarConfig(21, residual=True))


def test_plain_blocks_have_no_shortcut() -> None:
    block = PlainBlock(4, 4).eval()
    nn.init.zeros_(block.bn2.weight)
    assert not block(torch.rand(1, 4, 8, 8)).any()


def test_googlenet_answers_as_torchvisions_does_to_the_same_pixels() -> None:
    """torchvision normalises by ImageNet's statistics and undoes it inside; ours takes -1..1 directly."""
    torch.manual_seed(0)
    published = torchvision.models.googlenet(init_weights=False, transform_input=True, aux_logits=False).eval()
    ours = GoogLeNetClassifier().eval()
    ours.load_state_dict(published.state_dict())
    pixels = torch.rand(2, 3, 64, 64)
    image, preset = catalogue()["googlenet"].input, GoogLeNet_Weights.IMAGENET1K_V1.transforms()
    assert isinstance(image, ImageInput)

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (pixels - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)

    with torch.inference_mode():
        expected = published(normalised(preset.mean, preset.std))
        assert torch.allclose(ours(normalised(image.mean, image.std)), expected, atol=1e-4)


def test_the_naive_inception_module_costs_more_and_only_grows() -> None:
    naive = on_meta(lambda: NaiveInception(192, ones=64, threes=128, fives=32))
    reduced = on_meta(GoogLeNetClassifier).inception3a
    assert naive(torch.zeros(1, 192, 28, 28, device="meta")).shape == (1, 64 + 128 + 32 + 192, 28, 28)
    assert multiply_adds(naive, 192, 28, 28) > 2 * multiply_adds(reduced, 192, 28, 28)


CHANNELS = {
    "resnet50-backbone": [256, 512, 1024, 2048],
    "resnet50-fpn": [256] * 5,
    "vgg16-backbone": [256, 512, 512],
    "googlenet-backbone": [480, 832, 1024],
}


@pytest.mark.parametrize(("height", "width"), [(64, 96), (97, 130)])
@pytest.mark.parametrize("name", CHANNELS)
def test_maps_have_their_strides_at_any_size(name: str, height: int, width: int) -> None:
    entry = catalogue()[name]
    maps = on_meta(entry.build)(torch.zeros(2, 3, height, width, device="meta"))
    assert [m.shape[1] for m in maps] == CHANNELS[name]
    for found, stride in zip(maps, entry.strides.values(), strict=True):
        for size, pixels in zip(found.shape[2:], (height, width), strict=True):
            assert pixels // stride <= size <= -(-pixels // stride)


@pytest.mark.parametrize(
    ("build", "classifier"), [(ResNet50Backbone, torchvision.models.resnet50), (GoogLeNetBackbone, GoogLeNetClassifier)]
)
def test_the_last_map_leads_to_the_classifiers_answer(
    build: type[nn.Module], classifier: Callable[[], nn.Module]
) -> None:
    published, backbone = classifier().eval(), build().eval()
    backbone.load_state_dict(published.state_dict())
    image = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        maps = backbone(image)
        assert torch.allclose(published.get_submodule("fc")(maps[-1].mean((2, 3))), published(image), atol=1e-4)


@pytest.mark.nightly
def test_vgg_maps_are_the_activations_before_the_poolings_and_embeddings_the_normalised_fc7() -> None:
    torch.manual_seed(0)
    published = torchvision.models.vgg16(init_weights=False).eval()
    with torch.inference_mode():  # torch's own initialisation loses a factor of 2.4 in every layer
        for parameter in published.parameters():
            parameter.mul_(6**0.5)
    maps, embedding = VGG16Backbone().eval(), VGG16Embedding().eval()
    for module in (maps, embedding):
        module.load_state_dict(published.state_dict(), assign=True)
    fc7: list[torch.Tensor] = []
    published.classifier[4].register_forward_hook(lambda *args: fc7.append(args[2]))
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        for found, end in zip(maps(images[:1, :, :64, :64]), (16, 23, 30), strict=True):
            assert isinstance(published.features[end], nn.MaxPool2d)
            assert torch.equal(found, published.features[:end](images[:1, :, :64, :64]))
            assert found.std() > 0.1
        (found,) = embedding(images)
        published(images)
    assert torch.allclose(found, fc7[0] / fc7[0].norm(dim=1, keepdim=True), atol=1e-6)
    assert (found[0] - found[1]).norm() > 0.01  # otherwise anything would pass


def test_segmentation_scores_are_torchvisions_for_every_pixel() -> None:
    torch.manual_seed(0)
    published = fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True).eval()
    module = FcnResNet50().eval()
    module.load_state_dict(published.state_dict())
    image = torch.randn(1, 3, 97, 131)
    with torch.inference_mode():
        (scores,) = module(image)
        assert torch.equal(scores, published(image)["out"])
    labels = catalogue()["fcn-resnet50"].labels()
    assert scores.shape == (1, len(labels), 97, 131)
    assert (len(labels), labels[0]) == (21, "__background__")


def published_faster_rcnn() -> nn.Module:
    module: nn.Module = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    return module


@pytest.mark.parametrize(
    ("ours", "published"),
    [
        (GoogLeNetClassifier, lambda: torchvision.models.googlenet(init_weights=False)),
        (GoogLeNetBackbone, lambda: torchvision.models.googlenet(init_weights=False)),
        (ResNet50Backbone, torchvision.models.resnet50),
        (ResNet50Fpn, published_faster_rcnn),
        (faster_rcnn, published_faster_rcnn),
        (VGG16Backbone, lambda: torchvision.models.vgg16(init_weights=False)),
        (VGG16Embedding, lambda: torchvision.models.vgg16(init_weights=False)),
        (FcnResNet50, lambda: fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)),
    ],
)
def test_published_state_dicts_load_unmodified(ours: type[nn.Module], published: Callable[[], nn.Module]) -> None:
    module, state = on_meta(ours), on_meta(published).state_dict()
    size = len(state)
    module.load_state_dict(state, strict=True, assign=True)
    assert len(state) == size
    del state[next(iter(module.state_dict()))]
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize("ours", [ResNet50Fpn, faster_rcnn])
def test_the_published_detectors_old_key_names_load(ours: type[nn.Module]) -> None:
    """The file dates from 2019: torchvision has since nested the convolutions of the pyramid and the proposals one
    level deeper. Its batch normalisation is frozen and counts no batches."""
    state = {}
    for key, tensor in on_meta(published_faster_rcnn).state_dict().items():
        if not key.endswith("num_batches_tracked"):
            renamed = re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0\.", r"\1.\2.", key)
            state[renamed.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = tensor
    assert {"backbone.fpn.inner_blocks.0.weight", "rpn.head.conv.weight"} <= state.keys()
    on_meta(ours).load_state_dict(state, strict=True, assign=True)


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
    assert_same_objects(ssd300(), published, torch.rand(2, 3, 300, 300))


@pytest.mark.parametrize(("height", "width"), [(97, 131), pytest.param(128, 128, marks=pytest.mark.nightly)])
def test_faster_rcnn_answers_as_torchvisions(height: int, width: int) -> None:
    """Padding, anchors, proposals, pooling from four levels, suppression."""
    torch.manual_seed(0)
    sizes = {"min_size": min(height, width), "max_size": max(height, width)}
    published = FasterRCNN(ResNet50Fpn().backbone, CLASSES, **sizes).eval()
    assert_same_objects(faster_rcnn(), published, torch.rand(1, 3, height, width).repeat(2, 1, 1, 1))


def test_suppression_keeps_the_surest_of_each_place_in_every_row() -> None:
    """Of three boxes in one place the surest stays, one elsewhere stays, one below the threshold goes."""
    here, there = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]
    boxes = torch.tensor([[here, here, here, there, there], [there, here, there, here, here]])
    scores = torch.tensor([[[0.5, 0.9, 0.6, 0.3, 0.1]], [[0.2, 0.0, 0.0, 0.05, 0.1]]])
    kept = surest(boxes, scores, 0.5, 0.1)
    torch.testing.assert_close(kept, torch.tensor([[[0, 0.9, 0, 0.3, 0]], [[0.2, 0, 0, 0, 0]]]))
    classes = torch.cat([scores, torch.tensor([[[0.8, 0.7, 0, 0, 0]], [[0, 0, 0, 0, 0.3]]])], dim=1)
    torch.testing.assert_close(surest(boxes, classes, 0.5, 0.1)[:, 0], kept[:, 0])
    assert surest(boxes, classes, 0.5, 0.1)[:, 1].nonzero().tolist() == [[0, 0], [1, 4]]


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
