"""The serving graph and its ONNX file: normalisation, softmax, free axes, and a file that depends on nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms.functional import normalize, to_tensor

from export.evidence import Sources, find_evidence
from export.graph import serving_graph, settle
from export.onnx import OPSET, to_onnx
from export.samples import noise_images
from export.verify import open_session, tensor_specs
from models.entry import Entry, ImageInput
from rafaga.bundle import Task
from tests.export import small

RNG = np.random.default_rng(3)
SHAPES = {
    "small-backbone": {
        "image": ("uint8", (None, None, None, 3)),
        "fine": ("float32", (None, 4, None, None)),
        "coarse": ("float32", (None, 6, None, None)),
    },
    "small-forecaster": {
        "history": ("float32", (None, None)),
        "length": ("int64", (None,)),
        "quantiles": ("float32", (None, 4, 3)),
    },
}


def test_normalises_as_torchvision_does() -> None:
    image = RNG.integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    pixels = ImageInput(5, 7, 3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    entry = Entry("identity", "none", Task.FEATURES, "none", nn.Identity, pixels, strides={"pixels": 1})
    found = serving_graph(entry, entry.build()).reference({"image": image})["pixels"]
    for row, before in zip(found, image, strict=True):
        expected = normalize(to_tensor(before), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-6)


def test_a_classifier_gives_probabilities_and_missing_outputs_are_named() -> None:
    entry = small.classifier()
    image = {"image": RNG.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)}
    probabilities = serving_graph(entry, entry.build()).reference(image)["probabilities"]
    assert probabilities.shape == (4, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="gives 2 outputs, the registry names 1: probabilities"):
        serving_graph(entry, small.SmallBackbone()).reference(image)


def deep_chain() -> nn.Module:
    layers = [nn.Sequential(nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1), nn.ReLU()) for i in range(16)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize(("build", "size"), [(resnet18, 64), (deep_chain, 16)])
def test_settled_random_weights_answer_by_the_image(build: Callable[[], nn.Module], size: int) -> None:
    """At initialisation a ResNet gives every image one class with certainty, and a deep chain only its last biases."""
    torch.manual_seed(0)
    graph = serving_graph(small.classifier(), build())
    images = {"image": noise_images(8, (size, size), 3, np.random.default_rng(0))}
    settle(graph, images)
    assert not graph.module.training
    probabilities = graph.reference(images)["probabilities"]
    assert np.isfinite(probabilities).all()
    assert probabilities.max() < 0.99
    assert np.ptp(probabilities, axis=0).max() > 0.1 * probabilities.max()


@pytest.mark.parametrize("entry", [small.backbone(), small.forecaster()], ids=lambda entry: entry.name)
def test_the_file_is_self_contained_and_its_axes_are_free(
    entry: Entry, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It names nothing of the machine that exported it, and the exporter prints nothing."""
    path = tmp_path / "model.onnx"
    to_onnx(serving_graph(entry, entry.build()), find_evidence(entry, Sources(), trained=False).example(), path)
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": OPSET}
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert str(Path(__file__).parent).encode() not in path.read_bytes()
    assert not model.functions
    output = capsys.readouterr()
    loud = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert (output.out, output.err, loud) == ("", "", [])
    inputs, outputs = tensor_specs(open_session(path))
    assert {spec.name: (spec.dtype, spec.shape) for spec in (*inputs, *outputs)} == SHAPES[entry.name]
