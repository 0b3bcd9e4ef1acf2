"""The classifiers against what their papers say of them."""

from __future__ import annotations

import pytest
import torch
import torchvision.models
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from export.graph import serving_graph
from models.cifar_resnet import CifarConfig, CifarResNet
from models.cnn import DigitCNN
from models.googlenet import GoogLeNetClassifier, NaiveInception
from models.lenet import LeNet5
from models.plain import PlainBlock, plain34
from models.training.images import prepare
from models.zoo import catalogue
from tests.models.counting import depth, multiply_adds, on_meta, parameters, shapes


def test_lenet5_layer_by_layer() -> None:
    module = LeNet5().eval()
    found = shapes(module, torch.zeros(1, 1, 28, 28))
    assert found["c1"] == (6, 28, 28)  # 28 = 32 - 4: the digit was padded
    assert found["s2"] == (6, 14, 14)
    assert found["c3"] == (16, 10, 10)
    assert found["s4"] == (16, 5, 5)
    assert found["c5"] == (120, 1, 1)
    assert found["f6"] == (84,)
    assert found["output"] == (10,)
    assert parameters(module) == 61_706


def test_lenet5_is_the_layers_one_after_another() -> None:
    torch.manual_seed(0)
    m = LeNet5().eval()
    written_out = nn.Sequential(
        nn.ZeroPad2d(2), m.c1, nn.Tanh(), nn.AvgPool2d(2, 2), m.c3, nn.Tanh(), nn.AvgPool2d(2, 2),
        m.c5, nn.Tanh(), nn.Flatten(), m.f6, nn.Tanh(), m.output,
    )  # fmt: skip
    image = torch.rand(3, 1, 28, 28)
    assert torch.equal(m(image), written_out(image))


def test_lenet5_sees_digits_padded_to_32x32() -> None:
    seen = []
    module = LeNet5().eval()
    module.c1.register_forward_pre_hook(lambda _, images: seen.append(images[0]))
    digit = torch.rand(1, 1, 28, 28)
    module(digit)
    assert seen[0].shape == (1, 1, 32, 32)
    assert torch.equal(seen[0][:, :, 2:-2, 2:-2], digit)
    assert seen[0].sum() == digit.sum()


@pytest.mark.parametrize("name", ["lenet5-mnist", "cnn-mnist", "resnet20-cifar10"])
def test_what_is_served_ends_in_a_softmax(name: str) -> None:
    torch.manual_seed(0)
    entry = catalogue()[name]
    module = entry.build().eval()
    image = torch.randint(0, 256, (3, entry.input.height, entry.input.width, entry.input.channels), dtype=torch.uint8)
    with torch.inference_mode():
        (probabilities,) = serving_graph(entry, module).module(image)
        expected = module(prepare(image, entry.input)).softmax(1)
    assert torch.allclose(probabilities, expected, atol=1e-5)
    assert torch.allclose(probabilities.sum(1), torch.ones(3), atol=1e-5)


def test_the_first_cnn() -> None:
    module = DigitCNN().eval()
    found = shapes(module, torch.zeros(1, 1, 28, 28))
    assert (found["conv1"], found["conv2"]) == ((32, 28, 28), (64, 14, 14))
    assert (found["dense"], found["output"]) == ((1024,), (10,))
    assert parameters(module) == 3_241_354


def test_the_first_cnn_is_the_layers_one_after_another() -> None:
    torch.manual_seed(0)
    m = DigitCNN().eval()
    written_out = nn.Sequential(
        m.conv1, nn.ReLU(), nn.MaxPool2d(2, 2), m.conv2, nn.ReLU(), nn.MaxPool2d(2, 2),
        nn.Flatten(), m.dense, nn.ReLU(), m.output,
    )  # fmt: skip
    image = torch.rand(3, 1, 28, 28)
    assert torch.equal(m(image), written_out(image))
    assert {c.kernel_size for c in (m.conv1, m.conv2)} == {(3, 3)}


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *((f"vgg{n}", n) for n in (16, 19)),
        *((f"resnet{n}", n) for n in (18, 34, 50, 101, 152)),
        ("plain34", 34),
        ("googlenet", 22),
        *((f"{kind}{n}-cifar10", n) for kind in ("resnet", "plain") for n in (20, 56)),
    ],
)
def test_networks_are_as_deep_as_they_are_called(name: str, layers: int) -> None:
    assert depth(on_meta(catalogue()[name].build)) == layers


@pytest.mark.parametrize(("layers", "count"), [(20, 269_722), (56, 853_018)])
def test_cifar_networks(layers: int, count: int) -> None:
    residual, plain = (CifarResNet(CifarConfig(layers, residual)).eval() for residual in (True, False))
    assert parameters(residual) == parameters(plain) == count  # the shortcuts are free
    found = shapes(residual, torch.zeros(1, 3, 32, 32))
    assert [found[f"stage{i}"] for i in (1, 2, 3)] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_cifar_shortcuts_carry_the_input() -> None:
    module = CifarResNet(CifarConfig(20, residual=True)).eval()
    block = module.stage2[0]
    nn.init.zeros_(block.bn2.weight)  # the residual branch gives nothing
    x = torch.rand(2, 16, 32, 32)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_cifar_depth_must_be_6n_plus_2() -> None:
    with pytest.raises(ValueError, match="6n"):
        CifarResNet(CifarConfig(21, residual=True))


def test_vgg16_has_13_convolutions_and_3_dense_layers() -> None:
    module = on_meta(lambda: torchvision.models.vgg16(init_weights=False))
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    dense = [m.out_features for m in module.modules() if isinstance(m, nn.Linear)]
    assert len(convolutions) == 13
    assert {(m.kernel_size, m.stride) for m in convolutions} == {((3, 3), (1, 1))}
    assert {m.padding for m in convolutions} == {(1, 1)}
    assert dense == [4096, 4096, 1000]
    assert parameters(module) == 138_357_544
    found = shapes(module, torch.zeros(1, 3, 224, 224, device="meta"))
    assert found["features"] == found["avgpool"] == (512, 7, 7)  # at 224 nothing is left for torchvision's pooling


@pytest.mark.parametrize("name", [n for n, e in catalogue().items() if e.dataset == "ImageNet-1k" and not e.strides])
def test_classifiers_of_imagenet_take_224x224(name: str) -> None:
    image = catalogue()[name].input
    assert (image.height, image.width, image.channels) == (224, 224, 3)


def test_vgg19_costs_19_6_billion_multiply_adds() -> None:
    module = on_meta(lambda: torchvision.models.vgg19(init_weights=False))
    assert multiply_adds(module, 3, 224, 224) == pytest.approx(19.6e9, rel=0.01)


BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@pytest.mark.parametrize(("layers", "billions"), [(18, 1.8), (34, 3.6), (50, 3.8), (101, 7.6), (152, 11.3)])
def test_resnets_are_built_and_cost_as_the_paper_says(layers: int, billions: float) -> None:
    module = on_meta(getattr(torchvision.models, f"resnet{layers}"))
    stages = (module.layer1, module.layer2, module.layer3, module.layer4)
    assert tuple(len(stage) for stage in stages) == BLOCKS[layers]
    assert {type(block) for stage in stages for block in stage} == {BasicBlock if layers < 50 else Bottleneck}
    assert (module.conv1.kernel_size, module.conv1.stride, module.conv1.padding) == ((7, 7), (2, 2), (3, 3))
    found = shapes(module, torch.zeros(1, 3, 224, 224, device="meta"))
    assert found["conv1"] == (64, 112, 112)
    widths = [64, 128, 256, 512] if layers < 50 else [256, 512, 1024, 2048]
    sizes = [56, 28, 14, 7]
    assert [found[f"layer{i}"] for i in range(1, 5)] == [(w, s, s) for w, s in zip(widths, sizes, strict=True)]
    for block in module.modules():
        if isinstance(block, Bottleneck):  # the paper's stride is in the 1x1, torchvision's in the 3x3
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    assert multiply_adds(module, 3, 224, 224) == pytest.approx(billions * 1e9, rel=0.025)


def test_plain34_is_resnet34_without_shortcuts() -> None:
    plain, residual = on_meta(plain34), on_meta(torchvision.models.resnet34)
    assert multiply_adds(plain, 3, 224, 224) == pytest.approx(3.6e9, rel=0.025)
    dropped = {key for key in residual.state_dict() if ".downsample." in key}
    assert set(plain.state_dict()) == set(residual.state_dict()) - dropped
    block = PlainBlock(4, 4).eval()
    nn.init.zeros_(block.bn2.weight)
    assert not block(torch.rand(1, 4, 8, 8)).any()


def test_googlenet_costs_1_5_billion_multiply_adds_and_has_few_parameters() -> None:
    module, alexnet = on_meta(GoogLeNetClassifier), on_meta(torchvision.models.alexnet)
    assert multiply_adds(module, 3, 224, 224) == pytest.approx(1.5e9, rel=0.03)
    assert parameters(module) == 6_624_904
    assert parameters(alexnet) / parameters(module) == pytest.approx(9.2, abs=0.05)


def test_the_googlenet_of_the_paper_has_7_million_parameters() -> None:
    """Which is 8.7 times fewer than AlexNet's 61 million; the paper says 12 times."""
    ours, alexnet = on_meta(GoogLeNetClassifier), on_meta(torchvision.models.alexnet)
    convolutions = [m for m in ours.modules() if isinstance(m, nn.Conv2d)]
    biases = sum(m.out_channels for m in convolutions) - sum(
        parameters(m) for m in ours.modules() if isinstance(m, nn.BatchNorm2d)
    )
    threes = [m.branch3[1].conv for name, m in ours.named_children() if name.startswith("inception")]
    fives = sum(m.weight.numel() // (3 * 3) * (5 * 5 - 3 * 3) for m in threes)
    assert parameters(ours) + biases + fives == 6_998_552
    assert parameters(alexnet) / 6_998_552 == pytest.approx(8.7, abs=0.05)


def test_googlenet_answers_as_torchvisions_does_to_the_same_pixels() -> None:
    """torchvision normalises by ImageNet's statistics and undoes it inside; ours is given -1..1 at once."""
    from torchvision.models import GoogLeNet_Weights

    torch.manual_seed(0)
    published = torchvision.models.googlenet(init_weights=False, transform_input=True, aux_logits=False).eval()
    ours = GoogLeNetClassifier().eval()
    ours.load_state_dict(published.state_dict())
    pixels = torch.rand(2, 3, 64, 64)
    image, preset = catalogue()["googlenet"].input, GoogLeNet_Weights.IMAGENET1K_V1.transforms()

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
        return (pixels - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)

    with torch.inference_mode():
        expected = published(normalised(preset.mean, preset.std))
        assert torch.allclose(ours(normalised(image.mean, image.std)), expected, atol=1e-4)


def test_googlenet_has_nine_modules_with_3x3_in_the_5x5_branch() -> None:
    module = on_meta(GoogLeNetClassifier)
    inceptions = [m for name, m in module.named_children() if name.startswith("inception")]
    assert len(inceptions) == 9
    assert {m.branch3[1].conv.kernel_size for m in inceptions} == {(3, 3)}


def test_the_naive_inception_module_costs_more_and_can_only_grow() -> None:
    naive = on_meta(lambda: NaiveInception(192, ones=64, threes=128, fives=32))
    reduced = on_meta(lambda: torchvision.models.googlenet(init_weights=False).inception3a)
    assert shapes(naive, torch.zeros(1, 192, 28, 28, device="meta"))[""] == (64 + 128 + 32 + 192, 28, 28)
    assert shapes(reduced, torch.zeros(1, 192, 28, 28, device="meta"))[""] == (256, 28, 28)
    assert multiply_adds(naive, 192, 28, 28) > 2 * multiply_adds(reduced, 192, 28, 28)
