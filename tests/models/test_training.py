"""The training command: data in every place they may lie, runs that resume, records of what was done."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from models.progress import SILENT, Steps
from models.training import data, degradation
from models.training.__main__ import main
from models.training.data import DataUnavailable, load_etth1, load_mnist, load_sp500
from models.training.images import crop_and_flip
from models.training.loop import Batch, Optimiser, Problem, TrainingDevice, TrainingSchedule, fit, training_device
from models.training.recipes import CIFAR_NETWORKS, recipes
from models.zoo import catalogue
from rafaga.bundle import Metric
from tests.models.support import RecordedSteps

QUIET = Console(quiet=True)


def write_mnist(folder: Path, packed: bool = True) -> tuple[data.Images, data.Images]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = np.arange(256, dtype=np.uint8) % 10
    images = rng.integers(0, 40, (256, 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 6, 4:24] = 255  # classes differ by height
    for stem in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            raw = b"\x00\x00\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
            (folder / f"{stem}-{kind}-ubyte{'.gz' * packed}").write_bytes(gzip.compress(raw, 1) if packed else raw)
    return images, labels


@pytest.mark.parametrize(("inside", "packed"), [("mnist", True), ("MNIST/raw", False), (".", True)])
def test_mnist_is_found_in_its_usual_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, packed: bool
) -> None:
    root = tmp_path / "data"
    images, labels = write_mnist(root / inside, packed)
    monkeypatch.setenv("RAFAGA_DATA", str(root))
    for place in (root, None):
        found, found_labels = load_mnist(place, train=False)
        assert (found == images).all()
        assert (found_labels == labels).all()
        assert (found.dtype, found_labels.dtype) == (np.uint8, np.int64)


def test_a_given_folder_is_the_only_one_and_a_broken_file_is_refused(tmp_path: Path) -> None:
    loads: list[Callable[[Path], object]] = [lambda root: load_mnist(root, True), load_etth1, load_sp500]
    for load in loads:
        with pytest.raises(DataUnavailable, match=str(tmp_path)):
            load(tmp_path)
    write_mnist(tmp_path / "mnist", packed=False)
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(b"<html>moved</html>")
    with pytest.raises(DataUnavailable, match="not an idx file"):
        load_mnist(tmp_path, train=True)


def test_offline_the_error_says_where_to_put_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.delenv("RAFAGA_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.MNIST", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    loads: list[Callable[[], object]] = [
        lambda: load_mnist(None, True), lambda: load_etth1(None), lambda: load_sp500(None)
    ]  # fmt: skip
    for load in loads:
        with pytest.raises(DataUnavailable, match=r"no route to host[\s\S]*RAFAGA_DATA"):
            load()


def test_crops_and_flips_are_parts_of_the_padded_photo() -> None:
    torch.manual_seed(0)
    photos = torch.randn(4, 3, 32, 32)
    padded = F.pad(photos, (4, 4, 4, 4), mode="reflect")
    for photo, cropped in zip(padded, crop_and_flip(photos), strict=True):
        windows = [photo[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        assert any(torch.equal(cropped, w) or torch.equal(cropped, w.flip(2)) for w in windows)


class Line(Problem):
    """y = 2x + 1, learned from random points."""

    batches_per_epoch = 5

    def __init__(self, stop_in_epoch: int | None = None) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.1), nn.Linear(4, 1))
        self.stop_in_epoch = stop_in_epoch
        self.epoch = 0

    def batches(self) -> Iterator[Batch]:
        self.epoch += 1
        for _ in range(self.batches_per_epoch):
            if self.epoch == self.stop_in_epoch:
                raise KeyboardInterrupt
            x = torch.rand(8, 1)
            yield x, 2 * x + 1

    def loss(self, batch: Batch) -> Tensor:
        return F.mse_loss(self.module(batch[0]), batch[1])

    def evaluate(self, steps: Steps = SILENT) -> tuple[Metric, ...]:
        return ()


@pytest.mark.parametrize("optimiser", list(Optimiser))
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, optimiser: Optimiser) -> None:
    schedule = TrainingSchedule(epochs=6, peak_rate=0.05, weight_decay=0.01, optimiser=optimiser, clip_norm=1.0)
    whole = Line()
    fit(whole, schedule, tmp_path / "whole.pt", resume=False, console=QUIET)
    with pytest.raises(KeyboardInterrupt):
        fit(Line(stop_in_epoch=4), schedule, tmp_path / "stopped.pt", resume=False, console=QUIET)
    torch.manual_seed(99)  # a new process has another state of the generator
    resumed = Line()
    fit(resumed, schedule, tmp_path / "stopped.pt", resume=True, console=QUIET)
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[key])


class Overfitting(Line):
    """The validation loss is 5, 3, 4, 4, 4, ... after the epochs."""

    def __init__(self, stop_in_epoch: int | None = None) -> None:
        super().__init__(stop_in_epoch)
        self.states: list[dict[str, Tensor]] = []

    def validation(self) -> Iterator[Batch]:
        self.states.append({key: value.clone() for key, value in self.module.state_dict().items()})
        yield (torch.tensor({1: 5.0, 2: 3.0}.get(self.epoch, 4.0)),)

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) if len(batch) == 2 else batch[0]


def test_training_stops_early_and_keeps_the_best_epoch(tmp_path: Path) -> None:
    schedule = TrainingSchedule(epochs=9, peak_rate=0.05, weight_decay=0.01, patience=3)
    early = Overfitting()
    assert fit(early, schedule, tmp_path / "early.pt", resume=False, console=QUIET).epochs == 2
    assert early.epoch == 5
    second = replace(schedule, patience=None, stop_after=2)
    twice = Line()
    assert fit(twice, second, tmp_path / "second.pt", resume=False, console=QUIET).epochs == 2
    again = Overfitting()
    assert fit(again, schedule, tmp_path / "early.pt", resume=True, console=QUIET).epochs == 2
    assert again.epoch == 0, "it had stopped"
    for key, value in early.module.state_dict().items():
        assert torch.equal(value, early.states[1][key])
        assert torch.equal(value, twice.module.state_dict()[key])
        assert torch.equal(value, again.module.state_dict()[key])


def write_cifar10(root: Path, photos: int) -> None:
    """The JPEG copy, with as many photos of each class in either part."""
    (root / "cifar10").mkdir(parents=True)
    rng = np.random.default_rng(0)
    with tarfile.open(root / "cifar10" / "cifar10_jpeg_60000.tar.xz", "w:xz", preset=0) as tar:
        for part in ("train", "test"):
            for label, name in enumerate(data.CIFAR10_CLASSES):
                for number in range(photos):
                    pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                    pixels[3 * label : 3 * label + 4] += 190
                    buffer = BytesIO()
                    Image.fromarray(pixels).save(buffer, "jpeg")
                    entry = tarfile.TarInfo(f"cifar10/{part}/{name}/{number:04}.jpg")
                    entry.size = buffer.tell()
                    buffer.seek(0)
                    tar.addfile(entry, buffer)


def test_the_jpeg_copy_of_cifar10_is_decoded_once_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data.cifar10_name(tmp_path, train=False) == "CIFAR-10 test"
    write_cifar10(tmp_path, photos=30)
    assert data.cifar10_name(tmp_path, train=False) == "CIFAR-10 test, JPEG copy"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    steps = RecordedSteps()
    images, labels = data.load_cifar10(tmp_path, train=False, steps=steps)
    assert images.shape == (300, 32, 32, 3)
    assert np.bincount(labels).tolist() == [30] * 10
    ((what, (done, total)),) = steps.progress.items()
    assert "decoding" in what
    archive = data.cifar10_jpeg(tmp_path)
    assert archive
    assert 0 < done <= total == archive.stat().st_size
    cached = RecordedSteps()
    data.load_cifar10(tmp_path, train=True, steps=cached)
    assert not cached.progress


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert training_device(TrainingDevice.AUTO) == training_device(TrainingDevice.CPU) == torch.device("cpu")
    assert main(["lstm-co2", "--device", "cuda"]) == degradation.main(["--device", "cuda"]) == 1
    assert capsys.readouterr().out.count("no GPU") == 2
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert training_device(TrainingDevice.AUTO) == training_device(TrainingDevice.CUDA) == torch.device("cuda", 0)
    assert training_device(TrainingDevice.CPU) == torch.device("cpu")


@pytest.mark.parametrize(
    "networks",
    [["plain20-cifar10", "resnet20-cifar10"], pytest.param(list(CIFAR_NETWORKS), marks=pytest.mark.nightly)],
    ids=["two", "all"],
)
def test_plain_and_residual_networks_are_compared_by_one_command(
    networks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar10(tmp_path, photos=13)  # one batch
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ["--data", str(tmp_path), "--epochs", "1", "--device", "cpu"]
    code = degradation.main(["--networks", *networks, *options])
    said = capsys.readouterr().out
    assert {n for n in CIFAR_NETWORKS if f"{n}: 1 epochs, seed 0, on cpu" in said} == set(networks)
    assert "resnet20-cifar10 better than plain20-cifar10" in said
    assert code == (0 if said.count(", holds") == said.count(" better than ") else 1)


def test_the_claims_of_the_paper_are_judged() -> None:
    assert len({recipes()[name].schedule for name in CIFAR_NETWORKS}) == 1, "one recipe for all that are compared"
    paper = {"plain20-cifar10": 0.91, "plain56-cifar10": 0.87, "resnet20-cifar10": 0.92, "resnet56-cifar10": 0.93}
    assert [claim.points for claim in degradation.claims(paper)] == pytest.approx([4, 6, 1])
    assert all(claim.holds for claim in degradation.claims(paper))
    healed = {**paper, "plain56-cifar10": 0.92}
    assert [claim.holds for claim in degradation.claims(healed)] == [False, True, True]


def test_the_command_trains_measures_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "data" / "mnist")
    monkeypatch.chdir(tmp_path)
    arguments = ["lenet5-mnist", "--data", "data", "--epochs", "2", "--seed", "3", "--device", "cpu"]
    assert main([*arguments, "--output", "a.safetensors"]) == 0
    assert main([*arguments, "--output", "b.safetensors"]) == 0
    first, second = load_file("a.safetensors"), load_file("b.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)  # seeded
    catalogue()["lenet5-mnist"].build().load_state_dict(first)
    record: dict[str, Any] = json.loads((tmp_path / "a.json").read_text())
    assert record["command"] == "python -m models.training lenet5-mnist --epochs 2 --seed 3"
    assert record["metrics"][0]["samples"] == 256
    assert record["device"] == "cpu"
    assert str(tmp_path) not in json.dumps(record)


def test_the_command_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-model"]) == 2
    assert "lenet5-mnist" in capsys.readouterr().out
    assert main(["lenet5-mnist", "--data", str(tmp_path)]) == 1
    assert "no MNIST in" in capsys.readouterr().out
    assert main(["--list"]) == 0
    assert "lstm-reber" in capsys.readouterr().out
