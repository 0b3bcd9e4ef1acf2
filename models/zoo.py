"""The catalogue: every architecture that can be exported, with its data, weights and expected figures.

`python -m export --list` prints it. An entry builds an untrained module; `models.loading` loads the weights.
`catalogue()` imports torchvision; importing this module does not. Nothing is downloaded here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from models.entry import Corpus, Entry, ImageInput, Shipped, Torchvision
from rafaga.bundle import DetectionSpec, ForecastSpec, SequenceSpec, Task

COCO_LICENSE = "BSD-3-Clause (torchvision); trained on COCO, whose terms apply"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS = tuple("0123456789")
DIGIT_INPUT = ImageInput(height=28, width=28, channels=1, mean=(0.0,), std=(1.0,))  # zero is the background
CIFAR_INPUT = ImageInput(height=32, width=32, channels=3, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
CO2_INPUT = ForecastSpec(
    min_history=24,
    max_history=480,
    max_horizon=24,
    quantile_levels=QUANTILES,
    season=12,
    step="month",
    unit="ppm",
    frequency="MS",
)
ETT_INPUT = ForecastSpec(
    min_history=48,
    max_history=336,
    max_horizon=24,
    quantile_levels=QUANTILES,
    season=24,
    step="hour",
    unit="°C",
    frequency="h",
)
SP500_INPUT = ForecastSpec(
    min_history=20,
    max_history=256,
    max_horizon=20,
    quantile_levels=QUANTILES[1:-1],  # the range of 90 % held 84 % of later years
    season=1,
    step="trading day",
    unit="points",
    frequency="B",
)


def catalogue() -> Mapping[str, Entry]:
    """Every model by name, in the order of the printed table."""
    return {
        entry.name: entry
        for entry in (
            *_digits(),
            *_photos(),
            *_forecasters(),
            *_sequences(),
            *_imagenet_classifiers(),
            *_extractors(),
            *_segmenters(),
            *_detectors(),
        )
    }


def _digits() -> Iterator[Entry]:
    from models.cnn import DigitCNN
    from models.lenet import LeNet5

    yield Entry(
        name="lenet5-mnist",
        architecture="LeNet-5 (LeCun et al. 1998)",
        task=Task.CLASSIFICATION,
        dataset="MNIST",
        build=LeNet5,
        input=DIGIT_INPUT,
        weights=Shipped("lenet5-mnist.safetensors"),
        labels=lambda: DIGITS,
        corpus=Corpus.MNIST,
        expected={"top1": 0.990},
    )
    yield Entry(
        name="cnn-mnist",
        architecture="CNN: two convolutions and two dense layers",
        task=Task.CLASSIFICATION,
        dataset="MNIST",
        build=DigitCNN,
        input=DIGIT_INPUT,
        weights=Shipped("cnn-mnist.safetensors"),
        labels=lambda: DIGITS,
        corpus=Corpus.MNIST,
        expected={"top1": 0.992},
    )


def _photos() -> Iterator[Entry]:
    from models.cifar_resnet import CifarConfig, CifarResNet
    from models.training.data import CIFAR10_CLASSES

    for depth in (20, 56):
        for residual in (True, False):
            name = f"{'resnet' if residual else 'plain'}{depth}-cifar10"
            # The paper trains for 64,000 steps on the original photos: its figures do not apply to this recipe.
            shipped = name == "resnet20-cifar10"
            yield Entry(
                name=name,
                architecture=f"{'ResNet' if residual else 'Plain'}-{depth} for CIFAR (He et al. 2016)",
                task=Task.CLASSIFICATION,
                dataset="CIFAR-10",
                build=partial(CifarResNet, CifarConfig(depth, residual)),
                input=CIFAR_INPUT,
                weights=Shipped(f"{name}.safetensors"),
                labels=lambda: CIFAR10_CLASSES,
                corpus=Corpus.CIFAR10,
                expected={"top1": 0.85} if shipped else {},
                unpromised="" if shipped else "trained on demand: the accuracy of this recipe of 20 epochs is unknown",
            )


def _forecasters() -> Iterator[Entry]:
    from models.forecasting import Cell, Forecaster, ForecasterConfig

    def entry(name: str, dataset: str, spec: ForecastSpec, corpus: Corpus, **config: Any) -> Entry:
        forecaster = ForecasterConfig(
            season=spec.season, max_horizon=spec.max_horizon, quantile_levels=spec.quantile_levels, **config
        )
        return Entry(
            name=name,
            architecture=f"{config['cell'].upper()} with a multi-horizon quantile head (after Wen et al. 2017)",
            task=Task.FORECASTING,
            dataset=dataset,
            build=partial(Forecaster, forecaster),
            input=spec,
            weights=Shipped(f"{name}.safetensors"),
            corpus=corpus,
            expected={"mase": 1.0},
        )

    co2, ett, sp500 = "CO2 at Mauna Loa, monthly", "ETTh1, oil temperature, hourly", "S&P 500, daily close"
    yield entry("lstm-co2", co2, CO2_INPUT, Corpus.CO2, cell=Cell.LSTM, hidden=16, recent=120, drift=True)
    yield entry("rnn-co2", co2, CO2_INPUT, Corpus.CO2, cell=Cell.RNN, hidden=16, recent=120, drift=True)
    linear = {"hidden": 16, "recent": 240, "drift": False, "linear": ETT_INPUT.max_history}
    yield entry("lstm-ett", ett, ETT_INPUT, Corpus.ETTH1, cell=Cell.LSTM, **linear)
    walk = {"cell": Cell.LSTM, "hidden": 16, "recent": 20, "drift": False, "adaptive": True}
    why = "a random walk except for its volatility: no accuracy is promised for its median"
    yield replace(entry("lstm-sp500", sp500, SP500_INPUT, Corpus.SP500, **walk), expected={}, unpromised=why)


def _sequences() -> Iterator[Entry]:
    from models.reber import SYMBOLS, ReberLSTM

    yield Entry(
        name="lstm-reber",
        architecture="LSTM (Hochreiter & Schmidhuber 1997)",
        task=Task.SEQUENCE,
        dataset="embedded Reber grammar",
        build=ReberLSTM,
        input=SequenceSpec(max_length=256),
        weights=Shipped("lstm-reber.safetensors"),
        labels=lambda: tuple(SYMBOLS),
        corpus=Corpus.REBER,
        expected={"legal": 0.99, "remembered": 0.99},
    )


def _imagenet_classifiers() -> Iterator[Entry]:
    from torchvision import models

    from models.googlenet import GoogLeNetClassifier
    from models.plain import plain34

    yield _imagenet("resnet50", "ResNet-50 (He et al. 2016)", models.resnet50, "ResNet50_Weights.IMAGENET1K_V2")
    for depth, build in ((18, models.resnet18), (34, models.resnet34)):
        member = f"ResNet{depth}_Weights.IMAGENET1K_V1"
        yield _imagenet(f"resnet{depth}", f"ResNet-{depth} (He et al. 2016)", build, member)
    for depth, build in ((101, models.resnet101), (152, models.resnet152)):
        member = f"ResNet{depth}_Weights.IMAGENET1K_V2"
        yield _imagenet(f"resnet{depth}", f"ResNet-{depth} (He et al. 2016)", build, member)
    for depth, build in ((16, models.vgg16), (19, models.vgg19)):
        # Random weights are for load tests only: initialisation for training would cost seconds.
        yield _imagenet(
            f"vgg{depth}",
            f"VGG-{depth} (Simonyan & Zisserman 2015)",
            partial(build, init_weights=False),
            f"VGG{depth}_Weights.IMAGENET1K_V1",
        )
    yield _imagenet(
        "googlenet",
        "GoogLeNet (Szegedy et al. 2015), with batch normalisation and 3x3 in the 5x5 branch",
        GoogLeNetClassifier,
        "GoogLeNet_Weights.IMAGENET1K_V1",
    )
    plain = _imagenet("plain34", "Plain-34 (He et al. 2016)", plain34, "ResNet34_Weights.IMAGENET1K_V1")
    # Prepared like ResNet-34.
    why = "no published weights; the paper's figure (top-1 error 28.54 %) is for ten crops"
    yield replace(plain, weights=None, expected={}, unpromised=why)


def _extractors() -> Iterator[Entry]:
    from models.backbones import GoogLeNetBackbone, ResNet50Backbone, ResNet50Fpn, VGG16Backbone, VGG16Embedding

    yield _features(
        "resnet50-backbone",
        "ResNet-50, C2 to C5 (He et al. 2016)",
        ResNet50Backbone,
        "ResNet50_Weights.IMAGENET1K_V2",
        {"c2": 4, "c3": 8, "c4": 16, "c5": 32},
    )
    fpn = _features(
        "resnet50-fpn",
        "ResNet-50 with a feature pyramid, P2 to P6 (Lin et al. 2017)",
        ResNet50Fpn,
        "ResNet50_Weights.IMAGENET1K_V1",  # the detector's preset does not normalise; the network does, like this one
        {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64},
    )
    detector = Torchvision("FasterRCNN_ResNet50_FPN_Weights.COCO_V1", COCO_LICENSE)
    yield replace(fpn, dataset="COCO", weights=detector)
    yield _features(
        "vgg16-backbone",
        "VGG-16, conv3_3 to conv5_3 (Simonyan & Zisserman 2015)",
        VGG16Backbone,
        "VGG16_Weights.IMAGENET1K_V1",
        {"conv3_3": 4, "conv4_3": 8, "conv5_3": 16},
    )
    yield _features(
        "googlenet-backbone",
        "GoogLeNet, 3b, 4e and 5b (Szegedy et al. 2015), with batch normalisation and 3x3 in the 5x5 branch",
        GoogLeNetBackbone,
        "GoogLeNet_Weights.IMAGENET1K_V1",
        {"inception3b": 8, "inception4e": 16, "inception5b": 32},
    )
    embedding = _features(
        "vgg16-embedding",
        "VGG-16, fc7, L2-normalised (Simonyan & Zisserman 2015)",
        VGG16Embedding,
        "VGG16_Weights.IMAGENET1K_V1",
        {"embedding": 0},
    )
    yield replace(embedding, input=_image_input("VGG16_Weights.IMAGENET1K_V1"))


def _segmenters() -> Iterator[Entry]:
    from torchvision.models import get_weight

    from models.segmentation import FcnResNet50

    weights = get_weight("FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1")
    preset, published = weights.transforms(), weights.meta["_metrics"]["COCO-val2017-VOC-labels"]
    (shorter,) = preset.resize_size
    yield Entry(
        name="fcn-resnet50",
        architecture="FCN on a dilated ResNet-50 (Long et al. 2015)",
        task=Task.SEGMENTATION,
        dataset="COCO, 20 classes of Pascal VOC",
        build=FcnResNet50,
        input=ImageInput(None, None, 3, tuple(preset.mean), tuple(preset.std), shorter),
        weights=Torchvision("FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1", COCO_LICENSE),
        labels=lambda: tuple(weights.meta["categories"]),
        expected={"miou": published["miou"] / 100, "pixel_accuracy": published["pixel_acc"] / 100},
    )


def _detectors() -> Iterator[Entry]:
    from models.detectors import faster_rcnn, ssd300

    # torchvision stores the preparation of images in the networks, not with the weights.
    yield _detector(
        "ssd300-vgg16",
        "SSD300 on VGG-16 (Liu et al. 2016)",
        ssd300,
        DetectionSpec(max_objects=200, score_threshold=0.01, iou_threshold=0.45),
        "SSD300_VGG16_Weights.COCO_V1",
        ImageInput(300, 300, 3, mean=(0.48235, 0.45882, 0.40784), std=(1 / 255, 1 / 255, 1 / 255)),
    )
    yield _detector(
        "fasterrcnn-resnet50-fpn",
        "Faster R-CNN on ResNet-50 with a feature pyramid (Ren et al. 2015, Lin et al. 2017)",
        faster_rcnn,
        DetectionSpec(max_objects=100, score_threshold=0.05, iou_threshold=0.5),
        "FasterRCNN_ResNet50_FPN_Weights.COCO_V1",
        ImageInput(None, None, 3, IMAGENET_MEAN, IMAGENET_STD, resize_shorter=800, max_longer=1333),
    )


def _detector(
    name: str,
    architecture: str,
    build: Callable[[], nn.Module],
    detection: DetectionSpec,
    member: str,
    image: ImageInput,
) -> Entry:
    from torchvision.models import get_weight

    weights = get_weight(member)
    return Entry(
        name=name,
        architecture=architecture,
        task=Task.DETECTION,
        dataset="COCO",
        build=build,
        input=image,
        weights=Torchvision(member, COCO_LICENSE),
        labels=lambda: tuple(weights.meta["categories"]),
        detection=detection,
        expected={"box_map": weights.meta["_metrics"]["COCO-val2017"]["box_map"] / 100},
    )


def _features(
    name: str, architecture: str, build: Callable[[], nn.Module], member: str, strides: Mapping[str, int]
) -> Entry:
    """An extractor for images of any size, with the normalisation of `member`."""
    return Entry(
        name=name,
        architecture=architecture,
        task=Task.FEATURES,
        dataset="ImageNet-1k",
        build=build,
        input=replace(_image_input(member), height=None, width=None, resize_shorter=None),
        weights=Torchvision(member),
        strides=strides,
        unpromised="maps and embeddings have no labels: variants are compared with the fp32 file",
    )


def _imagenet(name: str, architecture: str, build: Callable[[], nn.Module], member: str) -> Entry:
    """A classifier with the input, labels and accuracy of its published weights."""
    from torchvision.models import get_weight

    weights = get_weight(member)
    published = weights.meta["_metrics"]["ImageNet-1K"]
    return Entry(
        name=name,
        architecture=architecture,
        task=Task.CLASSIFICATION,
        dataset="ImageNet-1k",
        build=build,
        input=_image_input(member),
        weights=Torchvision(member),
        labels=lambda: tuple(weights.meta["categories"]),
        expected={"top1": published["acc@1"] / 100, "top5": published["acc@5"] / 100},
    )


def _image_input(member: str) -> ImageInput:
    """The preparation with which the weights were measured."""
    from torchvision.models import get_weight

    preset = get_weight(member).transforms()
    (crop,), (resize,) = preset.crop_size, preset.resize_size
    mean, std = tuple(preset.mean), tuple(preset.std)
    if member.startswith("GoogLeNet"):
        # torchvision normalises as usual and converts to -1..1 inside the network; ours takes -1..1 directly.
        mean = std = (0.5,) * 3
    return ImageInput(height=crop, width=crop, channels=3, mean=mean, std=std, resize_shorter=resize)
