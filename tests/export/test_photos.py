"""Trained ImageNet classifiers on real photos, exported as your own models and served.

The reference is torchvision's own transform and the module in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import models, transforms

from demo.server import ServerProcess
from export import accuracy, samples
from export.__main__ import main
from export.arrays import Array
from export.labels import read_labels
from export.verify import open_session, run
from rafaga import Client
from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Calibration, Precision
from tests.models.support import data_root

NETS = ("mobilenet_v2", "shufflenet_v2_x1_0")


@dataclass(frozen=True)
class Photos:
    """The 800 sample photos; `right` int64 [800]: their classes, by the identifiers their names begin with."""

    folder: Path
    labels: Path
    weights: Path

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.JPEG"))

    @property
    def right(self) -> NDArray[np.int64]:
        identifiers = read_labels(self.labels).identifiers
        return np.array([identifiers.index(file.name.partition("_")[0]) for file in self.files])


@pytest.fixture(scope="module")
def photos() -> Photos:
    root = data_root("imagenet_samples/images")
    for net in NETS:
        data_root(f"weights/imagenet/{net}.pth")
    labels = root / "imagenet_samples/labels/imagenet_class_index.json"
    return Photos(root / "imagenet_samples/images", labels, root / "weights/imagenet")


def torchvision_answers(net: str, photos: Photos) -> Array:
    """Logits [800, 1000] by torchvision's transform and PyTorch."""
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    model = getattr(models, net)().eval()
    model.load_state_dict(torch.load(photos.weights / f"{net}.pth", weights_only=True))
    answers = []
    with torch.inference_mode():
        for start in range(0, len(photos.files), 25):
            images = [Image.open(file).convert("RGB") for file in photos.files[start : start + 25]]
            answers.append(model(torch.stack([transform(image) for image in images])))
    return np.asarray(torch.cat(answers).numpy())


def exported(net: str, photos: Photos, repository: Path) -> Bundle:
    """By the command, as your own model, with everything that is measured by default."""
    name = net.replace("_", "-")
    code = main(
        [
            *("--factory", f"torchvision.models:{net}", "--name", name, "--input-size", "224"),
            *("--resize-shorter", "256", "--labels", str(photos.labels)),
            *("--weights", str(photos.weights / f"{net}.pth"), "--eval-images", str(photos.folder)),
            *("--classes-from", "file"),
            *("--output", str(repository)),
        ]
    )
    assert code == 0
    return bundles.load(repository / name / "1")


def served_answers(repository: Path, model: str, precision: str, photos: Photos) -> tuple[str, NDArray[np.int64]]:
    """The precision that `--precision` led to, and the class of every photo [N], sent as it lies on the disk."""
    server = ServerProcess(repository, repository.parent / f"{precision}.log", ["--precision", precision])
    try:
        server.start()
        with Client(server.address, timeout_s=120) as client:
            served_as = client.model(model).precision
            found = []
            for start in range(0, len(photos.files), 10):
                found += client.classify_many(photos.files[start : start + 10], model=model, top_k=1)
        assert {answer.model.precision for answer in found} == {served_as}
        assert server.stop() == 0
    finally:
        server.kill()
    return served_as, np.array([answer.predictions[0].index for answer in found])


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("net", NETS)
def test_served_photos_are_classified_as_torchvision_does(net: str, photos: Photos, tmp_path: Path) -> None:
    """1. The fp32 file gives torchvision's probabilities on 50 photos. 2. All 800 through a server: fp32 and fp16
    within half a point of PyTorch, and the server's own choice at most half a point below (int8 may gain by chance)."""
    repository = tmp_path / "repository"
    bundle = exported(net, photos, repository)
    assert [variant.precision for variant in bundle.variants] == ["fp32", "fp16", "int8"]
    for variant in bundle.variants[1:]:
        assert variant.loss is not None
        assert (variant.loss.samples, variant.metrics[0].dataset) == (500, "imagenet_samples, 500 of 800")
        assert variant.default_eligible == variant.loss.within
    int8 = bundle.variants[2]
    assert int8.calibration == Calibration(dataset="imagenet_samples, 100 of 800", samples=100)

    logits = torchvision_answers(net, photos)
    assert bundle.image is not None
    rows = accuracy.spread(len(logits), 50)
    pixels = samples.photos(photos.folder, None, bundle.image).read(rows)
    answers = run(open_session(repository / bundle.name / "1" / "model.onnx"), {"image": pixels})["probabilities"]
    np.testing.assert_allclose(answers, torch.tensor(logits[rows]).softmax(1).numpy(), atol=1e-4)

    top1 = {"torchvision": float((logits.argmax(axis=1) == photos.right).mean())}
    for precision in ("fp32", "fp16", "int8", "auto"):
        served_as, classes = served_answers(repository, bundle.name, precision, photos)
        top1[precision] = float((classes == photos.right).mean())
        if precision == "auto":
            chosen = bundle.variant(Precision(served_as))
            assert chosen is not None
            assert chosen.default_eligible
        else:
            assert served_as == precision
    print(net, {name: f"{100 * value:.2f}" for name, value in top1.items()}, "auto:", served_as)
    print("layers in float:", len(int8.float_layers), *((v.precision, v.loss, v.cpu_speedup) for v in bundle.variants))
    for precision in ("fp32", "fp16"):
        assert abs(top1[precision] - top1["torchvision"]) <= 0.005, precision
    assert top1["torchvision"] - top1["auto"] <= 0.005
    if net == "mobilenet_v2":
        assert int8.float_layers != (), "quantised as a whole it loses two points of the photos that choose"
        assert int8.default_eligible
