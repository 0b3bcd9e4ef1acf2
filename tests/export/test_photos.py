"""Really trained ImageNet classifiers on real photos, as one's own models.

The reference is torchvision's own transform and the module in PyTorch. Compared with it are, on some photos, the
service's decoder and the exported file, and on all of them what a server answers that is sent the files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import models, transforms

from demo.server import ServerProcess
from export import accuracy
from export.__main__ import main
from export.graph import serving_graph
from export.labels import Labels, read_labels
from export.onnx import to_onnx
from export.own import OwnModel, own_entry
from export.samples import ImageSet, photos, preparation
from export.verify import open_session, run
from models.entry import ImageInput
from models.loading import load_weights
from rafaga import Client
from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Calibration, Precision, Task

NETS = ("mobilenet_v2", "shufflenet_v2_x1_0")


class Samples:
    """The sample photos with their classes."""

    def __init__(self, data: Path) -> None:
        self.folder = data / "imagenet_samples" / "images"
        self.labels_file = data / "imagenet_samples" / "labels" / "imagenet_class_index.json"
        self.weights = data / "weights" / "imagenet"

    @property
    def labels(self) -> Labels:
        return read_labels(self.labels_file)

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.JPEG"))

    @property
    def classes(self) -> NDArray[np.int64]:
        """By the identifiers that the files' names begin with: int64 [N]"""
        identifiers = self.labels.identifiers
        return np.array([identifiers.index(file.name.partition("_")[0]) for file in self.files])


@pytest.fixture(scope="module")
def samples(data_folder: Path) -> Samples:
    found = Samples(data_folder)
    if not (found.folder.is_dir() and all((found.weights / f"{net}.pth").is_file() for net in NETS)):
        pytest.skip(f"no imagenet_samples/ with weights/imagenet/{{{','.join(NETS)}}}.pth in {data_folder}")
    return found


def torchvision_answers(net: str, samples: Samples, rows: list[int]) -> np.ndarray:
    """Logits [N, 1000] by torchvision's transform and PyTorch."""
    transform = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    files = samples.files
    model = getattr(models, net)()
    model.load_state_dict(torch.load(samples.weights / f"{net}.pth", weights_only=True))
    model.eval()
    answers = []
    with torch.inference_mode():
        for start in range(0, len(rows), 25):
            chosen = [Image.open(files[row]) for row in rows[start : start + 25]]
            answers.append(model(torch.stack([transform(image.convert("RGB")) for image in chosen])))
            for image in chosen:
                image.close()
    return np.asarray(torch.cat(answers).numpy())


def served(net: str, samples: Samples, folder: Path) -> tuple[Path, ImageSet]:
    """The exported file, and the photos as the service prepares them."""
    own = OwnModel(
        factory=f"torchvision.models:{net}",
        name=net,
        task=Task.CLASSIFICATION,
        size=(224, 224),
        resize_shorter=256,
        labels=samples.labels,
    )
    entry = own_entry(own)
    module = entry.build()
    load_weights(entry, module, samples.weights / f"{net}.pth")
    assert isinstance(entry.input, ImageInput)
    pictures = photos(samples.folder, samples.labels, preparation(entry.input))
    to_onnx(serving_graph(entry, module), {"image": pictures.read([0, 1])}, folder / "model.onnx")
    return folder / "model.onnx", pictures


@pytest.mark.parametrize("net", [pytest.param(NETS[0], marks=pytest.mark.nightly), NETS[1]])
def test_answers_are_torchvisions(net: str, samples: Samples, tmp_path: Path) -> None:
    """On fifty photos spread over the classes: the same answer to each, and the same share of right ones."""
    path, pictures = served(net, samples, tmp_path)
    rows = accuracy.spread(len(pictures), 50)
    logits = torchvision_answers(net, samples, rows)
    probabilities = run(open_session(path), {"image": pictures.read(rows)})["probabilities"]
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)
    right = pictures.labels[rows]
    assert (logits.argmax(axis=1) == right).mean() > 0.7, "labels and photos belong together"
    np.testing.assert_array_equal(probabilities.argmax(axis=1), logits.argmax(axis=1))


def exported(net: str, samples: Samples, repository: Path) -> Bundle:
    """By the command, as one's own model, with everything that is measured by default."""
    name = net.replace("_", "-")
    code = main(
        [
            *("--factory", f"torchvision.models:{net}", "--name", name, "--input-size", "224"),
            *("--resize-shorter", "256", "--labels", str(samples.labels_file)),
            *("--weights", str(samples.weights / f"{net}.pth"), "--eval-images", str(samples.folder)),
            *("--output", str(repository)),
        ]
    )
    assert code == 0
    return bundles.load(repository / name / "1")


def asked_of_the_server(
    repository: Path, model: str, precision: str, samples: Samples
) -> tuple[str, NDArray[np.int64]]:
    """Which precision `--precision` made of it, and the class of every photo [N], sent as it lies on the disk."""
    server = ServerProcess(repository, repository.parent / f"{precision}.log", ["--precision", precision])
    try:
        server.start()
        with Client(server.address, timeout_s=120) as client:
            served_as = client.model(model).precision
            found = []
            for start in range(0, len(samples.files), 10):
                found += client.classify_many(samples.files[start : start + 10], model=model, top_k=1)
        assert {answer.model.precision for answer in found} == {served_as}
        assert server.stop() == 0
    finally:
        server.kill()
    return served_as, np.array([answer.predictions[0].index for answer in found])


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("net", NETS)
def test_served_photos_are_classified_as_torchvision_does(net: str, samples: Samples, tmp_path: Path) -> None:
    """All 800 files through a server: fp32 and fp16 within half a point of torchvision's transform and PyTorch, and
    what the server chooses for itself at most half a point below (int8 may gain by chance)."""
    repository = tmp_path / "repository"
    bundle = exported(net, samples, repository)
    assert [variant.precision for variant in bundle.variants] == ["fp32", "fp16", "int8"]
    for variant in bundle.variants[1:]:
        assert variant.loss is not None
        assert (variant.loss.samples, variant.metrics[0].dataset) == (500, "imagenet_samples, 500 of 800")
        assert variant.default_eligible == variant.loss.within
    int8 = bundle.variants[2]
    assert int8.calibration == Calibration(dataset="imagenet_samples, 100 of 800", samples=100)

    right = samples.classes
    assert len(right) == 800
    reference = torchvision_answers(net, samples, list(range(800))).argmax(axis=1)
    top1 = {"torchvision": float((reference == right).mean())}
    for precision in ("fp32", "fp16", "int8", "auto"):
        served_as, answers = asked_of_the_server(repository, bundle.name, precision, samples)
        top1[precision] = float((answers == right).mean())
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
