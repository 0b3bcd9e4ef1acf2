"""The serving graph, its ONNX file, and the bundles of tasks that are not classification."""

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

from export.arrays import alone
from export.evidence import PARITY_BATCHES, Sources, find_evidence
from export.graph import serving_graph, settle
from export.onnx import OPSET, to_onnx
from export.precisions import unsupported
from export.publish import ExportRequest, publish
from export.samples import noise_images
from export.verify import PARITY_GATE, ProofFailed, open_session, read_golden, run, tensor_specs, verify_bundle
from models.entry import Entry, ImageInput
from models.progress import Silent
from models.zoo import catalogue
from rafaga.bundle import GOLDEN, Bundle, Precision, Task
from tests.export import small
from tests.export.exporting import publish_small

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
    with pytest.raises(ProofFailed, match="gives 2 outputs, expected one tensor, or a dict with out or logits"):
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


def published(entry: Entry, folder: Path, *precisions: Precision) -> tuple[Path, Bundle]:
    found = publish_small(entry, folder, *precisions)
    assert [check.fault for check in verify_bundle(found.folder)] == [""] * len(found.bundle.variants)
    fp32 = found.bundle.variants[0]
    assert fp32.parity.max_relative_error <= PARITY_GATE
    assert set(fp32.parity.batch_sizes) >= set(PARITY_BATCHES)
    return found.folder, found.bundle


def test_a_detector(tmp_path: Path) -> None:
    folder, bundle = published(small.detector(), tmp_path, Precision.FP16, Precision.INT8)
    assert (bundle.task, bundle.labels[0]) == (Task.DETECTION, "nothing")
    assert bundle.detection == small.detector().detection
    assert [v.precision for v in bundle.variants] == [Precision.FP32], "accuracy loss of the others is unknown"
    assert [lost.precision for lost in unsupported(small.detector(), tuple(Precision))] == ["bf16", "fp16", "int8"]
    assert bundle.image is not None
    assert (bundle.image.resize_shorter, bundle.image.max_longer) == (64, 100)
    golden = read_golden(folder / GOLDEN).outputs
    assert (golden["scores"] > 0).any()
    assert (np.diff(golden["scores"]) <= 0).all()
    assert (golden["labels"] > 0).tolist() == (golden["scores"] > 0).tolist()


def test_a_segmenter(tmp_path: Path) -> None:
    folder, bundle = published(small.segmenter(), tmp_path)
    assert bundle.task is Task.SEGMENTATION
    assert [(o.name, o.dtype) for o in bundle.outputs] == [("labels", "uint8"), ("probabilities", "float32")]
    golden = read_golden(folder / GOLDEN).outputs
    assert len(np.unique(golden["labels"])) > 1
    assert ((golden["probabilities"] > 0) & (golden["probabilities"] <= 1)).all()


def test_the_shipped_next_symbol_model(tmp_path: Path) -> None:
    """Ragged rows answer as they do alone, and the figures are those that training promised."""
    found = publish(catalogue()["lstm-reber"], ExportRequest(tmp_path), Sources(), Silent())
    bundle = found.bundle
    assert (bundle.task, bundle.ragged, bundle.weights.trained) == (Task.SEQUENCE, True, True)
    assert bundle.sequence is not None
    assert bundle.sequence.max_length == 256
    (variant,) = bundle.variants
    figures = {m.name: m.value for m in variant.metrics}
    assert min(figures["legal"], figures["remembered"]) >= 0.99
    golden = read_golden(found.folder / GOLDEN)
    assert len(set(golden.inputs["length"].tolist())) > 1
    session = open_session(found.folder / "model.onnx")
    for row, expected in enumerate(golden.outputs["probabilities"]):
        (answer,) = run(session, alone(golden.inputs, row))["probabilities"]
        np.testing.assert_allclose(answer, expected, atol=1e-5)
    np.testing.assert_allclose(golden.outputs["probabilities"].sum(1), 1, atol=1e-5)
