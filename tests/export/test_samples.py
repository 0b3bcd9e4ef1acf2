"""Inputs are realistic, seeded, of the right kind, and never the same as what is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.evidence import CALIBRATION_IMAGES, PARITY_BATCHES, PARITY_SIZES, ImageEvidence, Sources, find_evidence
from export.labels import Labels, LabelsInvalid
from export.samples import ImageSet, noise_images, photos, split_photos, take_histories
from models.entry import Corpus
from models.training.data import DataUnavailable
from rafaga.bundle import Calibration, ImagePreparation
from tests.export import small

PREPARED = ImagePreparation(height=16, width=16, channels=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 photos of three classes, one grey each."""
    for number in range(24):
        name = small.CLASSES[number % 3]
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (20, 30), (number, number, number)).save(tmp_path / name / f"{number:02}.png")
    return tmp_path


def test_noise_is_seeded_and_has_structure() -> None:
    first, again, other = (noise_images(4, (32, 48), 3, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (4, 32, 48, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    regions = first.astype(float).reshape(4, 2, 16, 2, 24, 3).mean(axis=(2, 4))
    assert regions.std(axis=(1, 2)).min() > 1, "white noise has the same mean everywhere"


def test_histories_have_all_lengths_and_padding_of_zeros() -> None:
    shape = small.forecaster().input
    series = np.arange(1, 200, dtype=np.float32)
    inputs = take_histories(series, shape, 8, seed=0)  # type: ignore[arg-type]
    lengths = inputs["length"]
    assert lengths[0] == 5
    assert lengths[1] == 40
    assert inputs["history"].shape == (8, 40)
    for row, length in zip(inputs["history"], lengths, strict=True):
        assert (np.diff(row[:length]) == 1).all(), "a stretch of the series"
        assert (row[length:] == 0).all()


def test_parity_inputs_of_every_size() -> None:
    evidence = find_evidence(small.backbone(), Sources(), trained=False)
    shapes = [inputs["image"].shape for inputs in evidence.batches()]
    assert shapes == [(batch, *size, 3) for size in PARITY_SIZES for batch in PARITY_BATCHES]


def test_photos_are_prepared_as_the_service_does(folder: Path) -> None:
    found = photos(folder, Labels(small.CLASSES), PREPARED)
    assert len(found) == 24
    assert sorted(found.labels.tolist()) == sorted(list(range(3)) * 8)
    pixels = found.read([0, 23])
    assert pixels.shape == (2, 16, 16, 3)
    assert pixels[0, 0, 0, 0] == 0
    assert pixels[1, 0, 0, 0] == 23  # gamma/23.png, the last file by name


def test_photos_without_a_class_are_named(folder: Path) -> None:
    with pytest.raises(LabelsInvalid, match=r"gamma/02\.png: neither its folder nor its name"):
        photos(folder, Labels(("alpha", "beta")), PREPARED)
    assert (photos(folder, None, PREPARED).labels == -1).all()


def test_a_folder_without_photos_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable, match="no photos in"):
        photos(tmp_path, None, PREPARED)


def test_what_calibrates_or_chooses_is_not_measured_on(folder: Path) -> None:
    data = split_photos(photos(folder, Labels(small.CLASSES), PREPARED))
    assert data.held_out is not None
    assert data.calibration is not None
    assert data.choosing is not None
    held_out, calibration, choosing = (
        {int(image[0, 0, 0]) for image in part.read(range(len(part)))}
        for part in (data.held_out, data.calibration, data.choosing)
    )
    assert (len(held_out), len(calibration), len(choosing)) == (15, 3, 6)
    assert len(held_out | calibration | choosing) == 24
    assert data.held_out.name == f"{folder.name}, 15 of 24"


def test_calibration_photos_of_their_own(folder: Path) -> None:
    everything = photos(folder, Labels(small.CLASSES), PREPARED)
    data = split_photos(everything, everything)
    assert data.calibration is everything
    assert data.held_out is not None
    assert data.choosing is not None
    assert (len(data.held_out), len(data.choosing)) == (18, 6)


def evidence_of(**sources: Path) -> ImageEvidence:
    """Of a trained classifier of the three classes."""
    found = find_evidence(small.classifier(), Sources(**sources), trained=True)  # type: ignore[arg-type]
    assert isinstance(found, ImageEvidence)
    return found


def test_photos_that_calibrate_are_left_out_of_what_is_measured(folder: Path) -> None:
    """Where the folder that calibrates lies in the other one, or is the same, however it is written."""
    found = evidence_of(eval_images=folder, calibration_images=folder / "alpha")
    assert found.calibrated_on == Calibration(dataset="alpha", samples=8)
    assert found.data.held_out is not None
    assert found.data.choosing is not None
    assert set(found.data.held_out.labels) == set(found.data.choosing.labels) == {1, 2}
    assert (len(found.data.held_out), len(found.data.choosing)) == (12, 4)
    (folder / "again").symlink_to(folder, target_is_directory=True)
    same = evidence_of(eval_images=folder / "alpha", calibration_images=folder / "again" / "alpha")
    assert "but those that calibrate" in same.note
    assert (same.data.held_out, same.data.choosing) == (None, None)


def test_calibration_photos_are_used_where_nothing_can_be_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAFAGA_DATA", raising=False)
    found = evidence_of(calibration_images=folder)
    assert found.note == "no held-out data for none: give labelled photos with --eval-images DIR"
    assert found.data.held_out is None
    assert found.calibrated_on == Calibration(dataset=folder.name, samples=24)
    assert sum(len(batch) for batch in found.calibration()) == 24


def test_photos_that_nobody_asked_for_may_show_other_classes(folder: Path, tmp_path: Path) -> None:
    """ImageNet's sample photos lie in the data folder: a model of other classes is not measured, and not refused."""
    samples = tmp_path / "data" / "imagenet_samples" / "images"
    samples.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(samples / "n01440764_tench.png")
    assert "no held-out data" in evidence_of(data=tmp_path / "data").note
    with pytest.raises(LabelsInvalid, match="n01440764_tench"):
        evidence_of(eval_images=samples)


@pytest.mark.parametrize(("path", "name"), [("birds/images", "birds"), ("birds/val", "val"), ("birds", "birds")])
def test_data_is_called_by_a_name_that_says_something(tmp_path: Path, path: str, name: str) -> None:
    place = tmp_path / path
    place.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(place / "a.png")
    assert photos(place, None, PREPARED).name == name


def test_digits_are_calibrated_on_the_training_split(mnist_folder: Path) -> None:
    from dataclasses import replace

    from models.zoo import catalogue

    entry = replace(catalogue()["lenet5-mnist"], corpus=Corpus.MNIST)
    evidence = find_evidence(entry, Sources(data=mnist_folder), trained=True)
    assert isinstance(evidence, ImageEvidence)
    assert evidence.data.calibration is not None
    assert evidence.data.held_out is not None
    assert evidence.data.calibration.name == "MNIST training"
    assert evidence.data.choosing is not None
    assert (evidence.data.choosing.name, len(evidence.data.choosing)) == ("MNIST training", 2000)
    assert evidence.calibrated_on == Calibration(dataset="MNIST training", samples=CALIBRATION_IMAGES)
    assert (evidence.data.held_out.name, len(evidence.data.held_out)) == ("MNIST test", 10000)
    assert sum(len(batch) for batch in evidence.calibration()) == CALIBRATION_IMAGES


def test_missing_data_becomes_a_note(tmp_path: Path) -> None:
    from models.zoo import catalogue

    evidence = find_evidence(catalogue()["lenet5-mnist"], Sources(data=tmp_path), trained=True)
    assert isinstance(evidence, ImageEvidence)
    assert "no MNIST in" in evidence.note
    image = evidence.golden()["image"]
    assert image.shape == (3, 28, 28, 1)
    assert image.std() > 10


def test_subsets_read_what_they_say() -> None:
    everything = ImageSet("all", np.arange(10), lambda rows: np.asarray(rows, dtype=np.uint8)[:, None])
    part = everything.subset([7, 3], "part")
    assert part.labels.tolist() == [7, 3]
    assert part.read([1, 0]).tolist() == [[3], [7]]
