"""The training command: data in every place they may lie, runs that resume, records that tell the truth."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

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
from models.training.data import DataUnavailable, load_co2, load_etth1, load_mnist, load_sp500
from models.training.forecast_eval import baselines, held_out
from models.training.images import crop_and_flip, jitter_digits
from models.training.loop import Batch, Device, Optimiser, Problem, Schedule, fit, training_device
from models.training.recipes import CIFAR_NETWORKS, recipes
from models.zoo import catalogue
from rafaga.bundle import Metric
from tests.models.places import data_root

QUIET = Console(quiet=True)


def write_mnist(folder: Path, packed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = np.arange(256, dtype=np.uint8) % 10
    images = rng.integers(0, 40, (256, 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 6, 4:24] = 255  # told apart by height
    for stem in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            raw = b"\x00\x00\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
            name = f"{stem}-{kind}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
            else:
                (folder / name).write_bytes(raw)
    return images, labels


@pytest.mark.parametrize("inside", ["mnist", "MNIST/raw", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_found_wherever_people_keep_it(tmp_path: Path, inside: str, packed: bool) -> None:
    root = tmp_path / "data"
    images, labels = write_mnist(root / inside, packed)
    found, found_labels = load_mnist(root, train=False)
    assert (found == images).all()
    assert (found_labels == labels).all()
    assert (found.dtype, found_labels.dtype) == (np.uint8, np.int64)


def test_the_environment_names_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "mnist")
    monkeypatch.setenv("RAFAGA_DATA", str(tmp_path))
    assert load_mnist(None, train=True)[0].shape == (256, 28, 28)


@pytest.mark.parametrize("load", [lambda r: load_mnist(r, True), load_etth1, load_sp500])
def test_what_is_not_in_a_given_folder_is_not_looked_for_elsewhere(load: object, tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable, match=str(tmp_path)):
        load(tmp_path)


def test_offline_the_manual_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.delenv("RAFAGA_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.MNIST", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for load in (lambda: load_mnist(None, True), lambda: load_etth1(None), lambda: load_sp500(None)):
        with pytest.raises(DataUnavailable, match=r"no route to host[\s\S]*RAFAGA_DATA"):
            load()


def test_a_file_that_is_no_idx_file_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", packed=False)
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(b"<html>moved</html>")
    with pytest.raises(DataUnavailable, match="no idx file"):
        load_mnist(tmp_path, train=True)


def test_mnist_is_60000_and_10000_digits_of_28x28() -> None:
    for train, count in ((True, 60_000), (False, 10_000)):
        images, labels = load_mnist(data_root("mnist"), train)
        assert images.shape == (count, 28, 28)
        assert images.dtype == np.uint8
        assert set(labels.tolist()) == set(range(10))


def test_plain_and_residual_networks_share_one_recipe() -> None:
    known = recipes()
    assert len({known[name].schedule for name in CIFAR_NETWORKS}) == 1
    assert {known[name].dataset for name in CIFAR_NETWORKS} == {"CIFAR-10"}


def test_the_co2_record() -> None:
    series = load_co2()
    assert (series.dtype, series.shape) == (np.float32, (526,))
    assert np.isfinite(series).all()
    assert 310 < series.min() < series.max() < 375


def test_the_series_of_a_copy() -> None:
    root = data_root("timeseries")
    assert load_etth1(root).shape == (17420,)
    assert load_sp500(root).shape == (5105,)


@pytest.mark.parametrize("table", [data.ETTH1, data.SP500], ids=lambda t: t.name)
def test_the_copies_are_what_a_download_is_checked_against(table: data.Table) -> None:
    import hashlib

    content = (data_root("timeseries") / "timeseries" / table.name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == table.sha256


def test_crops_and_flips_are_parts_of_the_padded_photo() -> None:
    torch.manual_seed(0)
    photos = torch.randn(16, 3, 32, 32)
    padded = F.pad(photos, (4, 4, 4, 4), mode="reflect")
    for photo, cropped in zip(padded, crop_and_flip(photos), strict=True):
        windows = [photo[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        assert any(torch.equal(cropped, w) or torch.equal(cropped, w.flip(2)) for w in windows)


def test_jittered_digits_stay_digits() -> None:
    torch.manual_seed(0)
    digits = torch.zeros(32, 1, 28, 28)
    digits[:, :, 10:18, 10:18] = 1
    jittered = jitter_digits(digits)
    ink = jittered.sum((1, 2, 3))
    assert jittered.shape == digits.shape
    assert ((ink > 64 * 0.6) & (ink < 64 * 1.6)).all()
    assert not torch.allclose(jittered[0], jittered[1])


class Line(Problem):
    """y = 2x + 1, learnt from random points."""

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
    schedule = Schedule(epochs=6, peak_rate=0.05, weight_decay=0.01, optimiser=optimiser, clip_norm=1.0)
    whole = Line()
    fit(whole, schedule, tmp_path / "whole.pt", resume=False, console=QUIET)

    with pytest.raises(KeyboardInterrupt):
        fit(Line(stop_in_epoch=4), schedule, tmp_path / "stopped.pt", resume=False, console=QUIET)
    torch.manual_seed(99)  # a new process has another state of the generator
    resumed = Line()
    fit(resumed, schedule, tmp_path / "stopped.pt", resume=True, console=QUIET)
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[key])


class Told:
    """Steps as they are told: the names, and the furthest of each."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[int, int]] = {}

    def step(self, what: str) -> None:
        self.steps[what] = (0, 0)

    def advance(self, done: int, total: int) -> None:
        what = next(reversed(self.steps))
        assert self.steps[what][0] <= done <= total
        self.steps[what] = (done, total)


def write_cifar10(root: Path, photos: int) -> None:
    """The JPEG copy, with as many photos of each class in either part."""
    (root / "cifar10").mkdir(parents=True)
    rng = np.random.default_rng(0)
    with tarfile.open(root / "cifar10" / "cifar10_jpeg_60000.tar.xz", "w:xz") as tar:
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


def test_decoding_the_jpeg_copy_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, photos=30)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = Told()
    images, labels = data.load_cifar10(tmp_path, train=False, steps=told)
    assert images.shape == (300, 32, 32, 3)
    assert np.bincount(labels).tolist() == [30] * 10
    (what,) = told.steps
    assert "decoding" in what
    done, total = told.steps[what]
    assert 0 < done <= total == data.cifar10_jpeg(tmp_path).stat().st_size
    again = Told()
    data.load_cifar10(tmp_path, train=True, steps=again)
    assert not again.steps, "cached"


def test_measuring_tells_how_far_it_is(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist")
    told = Told()
    recipes()["lenet5-mnist"].problem(tmp_path, told).evaluate(told)
    assert told.steps == {"measuring on MNIST test": (256, 256)}


def test_fitting_the_statistical_baseline_tells_how_far_it_is() -> None:
    series = np.sin(np.arange(80, dtype=np.float32)) + 10
    spec = replace(catalogue()["lstm-sp500"].input, min_history=20, max_history=30, max_horizon=4)
    told = Told()
    origins = held_out(series, spec)
    baselines(origins, spec, "a wave", told)
    (fitting,) = told.steps.values()
    assert fitting == (len(origins.length), len(origins.length))


def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert training_device(Device.AUTO) == training_device(Device.CPU) == torch.device("cpu")
    for command, asked in ((main, ["lstm-co2"]), (degradation.main, [])):
        assert command([*asked, "--device", "cuda"]) == 1
        assert "no GPU" in capsys.readouterr().out
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert training_device(Device.AUTO) == training_device(Device.CUDA) == torch.device("cuda", 0)
    assert training_device(Device.CPU) == torch.device("cpu")


def test_plain_and_residual_networks_are_compared_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar10(tmp_path, photos=13)  # one batch
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = degradation.main(["--data", str(tmp_path), "--epochs", "1", "--device", "cpu"])
    said = capsys.readouterr().out
    for name in CIFAR_NETWORKS:
        assert f"{name}: 1 epochs, seed 0, on cpu" in said
    assert code == (0 if said.count(", holds") == len(degradation.CLAIMS) else 1)


def test_two_networks_alone_can_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar10(tmp_path, photos=13)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pair = ["plain20-cifar10", "resnet20-cifar10"]
    degradation.main(["--networks", *pair, "--data", str(tmp_path), "--epochs", "1", "--device", "cpu"])
    said = capsys.readouterr().out
    assert [name for name in CIFAR_NETWORKS if f"{name}: 1 epochs" in said] == sorted(pair, reverse=True)
    assert "resnet20-cifar10 better than plain20-cifar10" in said


def test_the_claims_of_the_paper_are_judged() -> None:
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
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["command"] == "python -m models.training lenet5-mnist --epochs 2 --seed 3"
    assert record["metrics"][0]["samples"] == 256
    assert record["device"] == "cpu"
    assert str(tmp_path) not in json.dumps(record)


def test_the_command_says_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-model"]) == 2
    assert "lenet5-mnist" in capsys.readouterr().out
    assert main(["lenet5-mnist", "--data", str(tmp_path)]) == 1
    assert "no MNIST in" in capsys.readouterr().out
    assert main(["--list"]) == 0
    assert "lstm-reber" in capsys.readouterr().out


def test_the_jpeg_copy_of_cifar10_is_named_as_what_it_is(tmp_path: Path) -> None:
    assert data.cifar10_name(tmp_path, train=False) == "CIFAR-10 test"
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "cifar10_jpeg_60000.tar.xz").touch()
    assert data.cifar10_name(tmp_path, train=False) == "CIFAR-10 test, JPEG copy"
    assert data.cifar10_name(tmp_path, train=True) == "CIFAR-10 training, JPEG copy"
