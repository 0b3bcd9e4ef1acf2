"""Inputs are realistic, seeded, of the right kind, and never the same as what is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.evidence import CALIBRATION_IMAGES, PARITY_BATCHES, PARITY_SIZES, ImageEvidence, Sources, find_evidence
from export.labels import Labels, LabelsInvalid
from export.samples import ImageSet, PhotoInvalid, photos, split_photos, take_histories
from models.entry import Entry
from models.training.data import DataUnavailable
from models.zoo import catalogue
from rafaga.bundle import Calibration, ForecastSpec, ImagePreparation
from tests.export import small
from tests.export.exporting import write_photos

PREPARED = ImagePreparation(height=16, width=16, channels=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 photos of three classes, of a colour each: their red is ten times their number."""
    return write_photos(tmp_path, [f"{small.CLASSES[number % 3]}/{number:02}" for number in range(24)], (20, 30))


def evidence_of(sources: Sources, entry: Entry | None = None) -> ImageEvidence:
    """Of a trained classifier; of the three classes if none is given."""
    found = find_evidence(entry or small.classifier(), sources, trained=True)
    assert isinstance(found, ImageEvidence)
    return found


def size(part: ImageSet | None) -> int:
    return 0 if part is None else len(part)


def test_histories_have_all_lengths_and_padding_of_zeros() -> None:
    shape = small.forecaster().input
    assert isinstance(shape, ForecastSpec)
    inputs = take_histories([np.arange(1, 200, dtype=np.float32)], shape, 8, seed=0)
    lengths = inputs["length"]
    assert lengths[:2].tolist() == [5, 40]
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
    assert (pixels[0, 0, 0, 0], pixels[1, 0, 0, 0]) == (0, 230)  # gamma/23.png is the last file by name


def test_photos_that_cannot_be_taken_are_named(folder: Path) -> None:
    message = r"gamma/02\.png: its folder's name is not one of the model's classes; --classes-from"
    with pytest.raises(LabelsInvalid, match=message):
        photos(folder, Labels(("alpha", "beta")), PREPARED)
    assert (photos(folder, None, PREPARED).labels == -1).all()
    (folder / "empty").mkdir()
    with pytest.raises(DataUnavailable, match="no photos in"):
        photos(folder / "empty", None, PREPARED)
    (folder / "beta" / "01.png").write_bytes(b"nothing")
    with pytest.raises(PhotoInvalid, match=r"beta/01\.png: expected a whole"):
        photos(folder, Labels(small.CLASSES), PREPARED).read(range(24))


def test_photos_that_calibrate_or_choose_are_not_measured_on(folder: Path) -> None:
    everything = photos(folder, Labels(small.CLASSES), PREPARED)
    data = split_photos(everything)
    parts = [
        {int(image[0, 0, 0]) for image in part.read(range(len(part)))}
        for part in (data.held_out, data.calibration, data.choosing)
        if part
    ]
    assert [len(part) for part in parts] == [15, 3, 6]
    assert len(set.union(*parts)) == 24
    assert data.held_out is not None
    assert data.held_out.name == f"{folder.name}, 15 of 24"
    data = split_photos(everything, everything)
    assert data.calibration is everything
    assert (size(data.held_out), size(data.choosing)) == (18, 6)


def test_calibration_photos_inside_the_evaluation_folder_are_left_out(folder: Path) -> None:
    """Also where both are the same folder under another name."""
    found = evidence_of(Sources(eval_images=folder, calibration_images=folder / "alpha"))
    assert found.calibrated_on == Calibration(dataset="alpha", samples=8)
    assert found.data.held_out is not None
    assert found.data.choosing is not None
    assert set(found.data.held_out.labels) == set(found.data.choosing.labels) == {1, 2}
    assert (size(found.data.held_out), size(found.data.choosing)) == (12, 4)
    (folder / "again").symlink_to(folder, target_is_directory=True)
    same = evidence_of(Sources(eval_images=folder / "alpha", calibration_images=folder / "again" / "alpha"))
    assert "except those used for calibration" in same.note
    assert (same.data.held_out, same.data.choosing) == (None, None)


def test_calibration_photos_are_used_where_nothing_can_be_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAFAGA_DATA", raising=False)
    found = evidence_of(Sources(calibration_images=folder))
    assert found.note == "no held-out data for none: give labelled photos with --eval-images DIR"
    assert found.data.held_out is None
    assert found.calibrated_on == Calibration(dataset=folder.name, samples=24)
    assert sum(len(batch) for batch in found.calibration()) == 24


def test_sample_photos_of_other_classes_are_ignored_unless_asked_for(tmp_path: Path) -> None:
    """ImageNet's sample photos are in the data folder: a model of other classes is neither measured nor refused."""
    samples = write_photos(tmp_path / "data" / "imagenet_samples" / "images", ["n01440764_tench"])
    assert "no held-out data" in evidence_of(Sources(data=tmp_path / "data")).note
    with pytest.raises(LabelsInvalid, match="n01440764_tench"):
        evidence_of(Sources(eval_images=samples))


def test_digits_are_calibrated_on_the_training_split(mnist_folder: Path, tmp_path: Path) -> None:
    lenet = catalogue()["lenet5-mnist"]
    evidence = evidence_of(Sources(data=mnist_folder), lenet)
    data = evidence.data
    names = [part.name for part in (data.held_out, data.calibration, data.choosing) if part]
    assert names == ["MNIST test", "MNIST training", "MNIST training"]
    assert (size(data.held_out), size(data.choosing)) == (10000, 2000)
    assert evidence.calibrated_on == Calibration(dataset="MNIST training", samples=CALIBRATION_IMAGES)
    assert sum(len(batch) for batch in evidence.calibration()) == CALIBRATION_IMAGES
    missing = evidence_of(Sources(data=tmp_path), lenet)
    assert "no MNIST in" in missing.note
    image = missing.golden()["image"]
    assert image.shape == (3, 28, 28, 1)
    assert image.std() > 10
