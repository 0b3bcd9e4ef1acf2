"""The serving graph: what happens to pixels before the model, and to logits after it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms.functional import normalize, to_tensor

from export.graph import serving_graph, settle
from export.samples import noise_images
from models.entry import Entry, ImageInput
from rafaga.bundle import Task
from tests.export import small

RNG = np.random.default_rng(3)


def test_normalises_as_torchvision_does() -> None:
    image = RNG.integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    entry = Entry(
        name="identity",
        architecture="none",
        task=Task.FEATURES,
        dataset="none",
        build=nn.Identity,
        input=ImageInput(5, 7, 3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        strides={"pixels": 1},
    )
    found = serving_graph(entry, entry.build()).reference({"image": image})["pixels"]
    for row, pixels in zip(found, image, strict=True):
        expected = normalize(to_tensor(pixels), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-6)


def test_a_classifier_gives_probabilities() -> None:
    entry = small.classifier()
    image = RNG.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    probabilities = serving_graph(entry, entry.build()).reference({"image": image})["probabilities"]
    assert probabilities.shape == (4, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)


def test_too_few_outputs_are_named() -> None:
    entry = small.classifier()
    model = small.SmallBackbone()
    with pytest.raises(ValueError, match="gives 2 outputs, the registry names 1: probabilities"):
        serving_graph(entry, model).reference({"image": np.zeros((1, 16, 16, 3), np.uint8)})


def test_random_weights_tell_images_apart() -> None:
    """As it is initialised, a random ResNet is certain of one class, the same for every image."""
    entry = Entry(
        name="resnet18",
        architecture="ResNet-18",
        task=Task.CLASSIFICATION,
        dataset="none",
        build=resnet18,
        input=ImageInput(64, 64, 3, mean=(0.5,) * 3, std=(0.25,) * 3),
    )
    torch.manual_seed(0)
    graph = serving_graph(entry, resnet18())
    images = {"image": noise_images(8, (64, 64), 3, np.random.default_rng(0))}
    settle(graph, images)
    assert not graph.module.training
    probabilities = graph.reference(images)["probabilities"]
    assert np.isfinite(probabilities).all()
    assert probabilities.max() < 0.5
    assert np.ptp(probabilities, axis=0).max() > 0.2 * probabilities.max()


def test_random_weights_without_normalisation_do_not_fade() -> None:
    """As it is initialised, a deep chain of convolutions answers with its last biases, whatever the image."""

    def chain() -> nn.Module:
        layers = [nn.Sequential(nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1), nn.ReLU()) for i in range(16)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))

    torch.manual_seed(0)
    entry = small.classifier()
    graph = serving_graph(entry, chain())
    images = {"image": noise_images(8, (16, 16), 3, np.random.default_rng(0))}

    def spread() -> float:
        return float(np.ptp(graph.reference(images)["probabilities"], axis=0).max())

    assert spread() < 1e-3
    settle(graph, images)
    assert spread() > 0.05
