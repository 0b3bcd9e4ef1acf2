"""Classifiers: sizes and costs as in the papers, and the answers of the published networks."""

from __future__ import annotations

import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models import GoogLeNet_Weights

from models.cifar_resnet import Block, CifarConfig, CifarResNet
from models.entry import ImageInput
from models.googlenet import GoogLeNetClassifier, NaiveInception
from models.lenet import LeNet5
from models.plain import PlainBlock
from models.zoo import catalogue
from tests.models.costs import multiply_adds, on_meta, parameters

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
    module = on_meta(entry.build)
    assert parameters(module) == PARAMETERS[name]
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
