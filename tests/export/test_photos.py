"""Really trained ImageNet classifiers on real photos, as one's own models.

The reference is torchvision's own transform and the module in PyTorch; compared with it are the service's decoder and
the exported file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models, transforms

from export import accuracy
from export.__main__ import main
from export.graph import serving_graph
from export.labels import Labels, read_labels
from export.onnx import to_onnx
from export.own import OwnModel, own_entry
from export.samples import ImageSet, photos, preparation
from export.verify import open_session, run
from models.entry import ImageInput, Task
from models.loading import load_weights
from rafaga import bundle as bundles

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
    files = sorted(samples.folder.glob("*.JPEG"))
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


@pytest.mark.parametrize("net", NETS)
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


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("net", NETS)
def test_all_photos_and_variants(net: str, samples: Samples, tmp_path: Path) -> None:
    """All 800 photos within half a point of torchvision; then fp16 and int8 within half a point of fp32."""
    path, pictures = served(net, samples, tmp_path)
    (top1, _) = accuracy.classify(open_session(path), pictures)
    rows = list(range(len(pictures)))
    reference = (torchvision_answers(net, samples, rows).argmax(axis=1) == pictures.labels).mean()
    assert top1.samples == 800
    assert abs(top1.value - reference) <= 0.005
    name = net.replace("_", "-")
    code = main(
        [
            *("--factory", f"torchvision.models:{net}", "--name", name, "--input-size", "224"),
            *("--resize-shorter", "256", "--labels", str(samples.labels_file)),
            *("--weights", str(samples.weights / f"{net}.pth"), "--eval-images", str(samples.folder)),
            *("--output", str(tmp_path / "repository")),
        ]
    )
    assert code == 0
    bundle = bundles.load(tmp_path / "repository" / name / "1")
    assert [variant.precision for variant in bundle.variants] == ["fp32", "fp16", "int8"]
    assert all(variant.default_eligible for variant in bundle.variants)
