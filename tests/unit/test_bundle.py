"""The bundle contract: what is refused, what is found, and that publishing is all or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from rafaga.bundle import (
    SCHEMA,
    Bundle,
    DetectionSpec,
    ImagePreparation,
    Parity,
    Precision,
    Provenance,
    Task,
    TensorSpec,
    Variant,
    Weights,
    load,
)
from rafaga.checksums import verify_files
from rafaga.errors import BundleError
from rafaga.publishing import publish
from rafaga.tensors import relative_error


def variant(precision: Precision = Precision.FP32, relative: float = 1e-6, absolute: float = 1.0) -> Variant:
    parity = Parity(max_absolute_error=absolute, max_relative_error=relative, batch_sizes=(1, 2))
    return Variant(precision=precision, file=f"model.{precision}.onnx", parity=parity)


def digits(version: int = 1, **changes: object) -> Bundle:
    parts: dict[str, object] = {
        "schema": SCHEMA,
        "name": "digits",
        "version": version,
        "task": Task.CLASSIFICATION,
        "architecture": "LeNet-5",
        "dataset": "MNIST",
        "inputs": (TensorSpec(name="image", dtype="uint8", shape=(None, 28, 28, 1)),),
        "outputs": (TensorSpec(name="probabilities", dtype="float32", shape=(None, 10)),),
        "weights": Weights(trained=True, source="here", license="Apache-2.0"),
        "variants": (variant(),),
        "provenance": Provenance(created="2026-01-01T00:00:00+00:00", rafaga="0", torch="0", onnx="0", opset=20),
        "files": {},
        "labels": tuple("0123456789"),
        "image": ImagePreparation(height=28, width=28, channels=1),
    }
    return Bundle(**(parts | changes))  # type: ignore[arg-type]


def fill(folder: Path, version: int) -> Bundle:
    (folder / "model.fp32.onnx").write_bytes(b"graph")
    (folder / "golden.npz").write_bytes(b"answers")
    return digits(version)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publish(tmp_path, "digits", None, fill)


def test_a_published_bundle_loads_unchanged(folder: Path) -> None:
    bundle = load(folder)
    verify_files(folder, bundle)
    assert set(bundle.files) == {"model.fp32.onnx", "golden.npz"}
    assert msgspec.structs.replace(bundle, files={}) == digits()


def test_versions_count_up_and_never_change(tmp_path: Path) -> None:
    assert publish(tmp_path, "digits", 7, fill) == tmp_path / "digits/7"
    assert publish(tmp_path, "digits", None, fill).name == "8"
    with pytest.raises(FileExistsError, match="published already"):
        publish(tmp_path, "digits", 7, fill)


def test_a_failed_publication_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path, version: int) -> Bundle:
        (folder / "model.onnx").write_bytes(b"half a graph")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, "digits", None, fail)
    assert list((tmp_path / "digits").iterdir()) == []


def test_changed_and_missing_files_are_named(folder: Path) -> None:
    bundle, file = load(folder), folder / "model.fp32.onnx"
    file.write_bytes(b"grapH")
    with pytest.raises(BundleError, match=r"model\.fp32\.onnx: sha256 is .* changed after it was published"):
        verify_files(folder, bundle)
    file.unlink()
    with pytest.raises(BundleError, match=r"model\.fp32\.onnx: missing"):
        verify_files(folder, bundle)
    file.symlink_to(folder / "golden.npz")
    with pytest.raises(BundleError, match=r"model\.fp32\.onnx: sha256 is"):
        verify_files(folder, bundle)


def test_links_inside_the_repository_are_followed_and_others_refused_by_name(tmp_path: Path) -> None:
    """1. A link beside the file. 2. A repository and a model that are links themselves. 3. A link out of it."""
    repository = tmp_path / "real"
    folder = publish(repository, "digits", None, fill)
    bundle = load(folder)
    for name in (*bundle.files, "bundle.json"):
        (folder / "..data").mkdir(exist_ok=True)
        (folder / name).rename(folder / "..data" / name)
        (folder / name).symlink_to(f"..data/{name}")
    verify_files(folder, load(folder))

    (tmp_path / "link").symlink_to(repository)
    verify_files(tmp_path / "link/digits/1", load(tmp_path / "link/digits/1"))
    (tmp_path / "others").mkdir()
    (tmp_path / "others/digits").symlink_to(repository / "digits")
    verify_files(tmp_path / "others/digits/1", load(tmp_path / "others/digits/1"))

    for name in ("model.fp32.onnx", "bundle.json"):
        (folder / "..data" / name).rename(tmp_path / name)
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(BundleError, match=rf"{name}: is a link to {tmp_path / name}, outside the repository"):
            verify_files(folder, load(folder))
    (tmp_path / "bundle.json").unlink()
    with pytest.raises(BundleError, match=r"bundle\.json: missing"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "schema 99 is not supported"),
        ({"name": "../etc"}, "does not match"),
        ({"version": 0}, "must be at least 1"),
        ({"labels": []}, "lacks labels"),
        ({"image": None}, "lacks image"),
        ({"task": "forecasting"}, "lacks forecast"),
        ({"task": "detection"}, "lacks detection"),
        ({"task": "sequence"}, "lacks sequence"),
        ({"task": "segmentation"}, "has the tensors labels uint8 of 3 axes, probabilities float32 of 3 axes"),
        ({"image": {"height": None, "width": None, "channels": 3, "max_longer": 9}}, "max_longer needs resize_shorter"),
        ({"task": "telepathy"}, "Invalid enum value"),
        ({"variants": []}, "at least one variant"),
        ({"files": {"../../passwd": "0"}}, "does not match"),
        ({"files": {}}, "not listed under files"),
        ({"features": [{"output": "c5", "stride": 32}]}, "an output that the graph does not have"),
        ({"surprise": 1}, "unknown field"),
        ({"inputs": "image"}, "Expected `array`"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_manifest_that_contradicts_itself_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    manifest = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(manifest | changes))
    with pytest.raises(BundleError, match=message):
        load(folder)


def test_a_bundle_lies_where_it_says(folder: Path) -> None:
    moved = folder.rename(folder.with_name("2"))
    with pytest.raises(BundleError, match="says digits version 1, which does not match its folder"):
        load(moved)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_an_invalid_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        load(folder)
    (folder / "bundle.json").unlink()
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        load(folder)


def test_detectors_see_whole_images() -> None:
    outputs = (
        TensorSpec(name="boxes", dtype="float32", shape=(None, 5, 4)),
        TensorSpec(name="scores", dtype="float32", shape=(None, 5)),
        TensorSpec(name="labels", dtype="int64", shape=(None, 5)),
    )
    spec = DetectionSpec(max_objects=5, score_threshold=0.1, iou_threshold=0.5)
    assert digits(task=Task.DETECTION, outputs=outputs, detection=spec).detection == spec
    cropped = ImagePreparation(height=28, width=28, channels=1, resize_shorter=32)
    with pytest.raises(ValueError, match="needs the whole image"):
        digits(task=Task.DETECTION, outputs=outputs, detection=spec, image=cropped)
    with pytest.raises(ValueError, match="boxes float32 of 3 axes"):
        digits(task=Task.DETECTION, outputs=outputs[::-1], detection=spec)


def test_tolerance_follows_the_measured_parity() -> None:
    """1. It is at least 1e-3. 2. The largest of a thousand probabilities is 2 %; int8 misses it by a quarter of that.
    Twice as much is let pass. Zeros are not."""
    assert variant(relative=1e-6).parity.golden_tolerance == 1e-3
    assert variant(relative=0.04).parity.golden_tolerance == pytest.approx(0.08)
    reference = np.array([[0.02, 0.001]])
    tolerance = variant(Precision.INT8, relative=0.25, absolute=0.005).parity.golden_tolerance
    assert relative_error(reference + 0.005, reference) <= tolerance
    assert relative_error(reference + 0.0099, reference) <= tolerance
    assert relative_error(np.zeros((1, 2)), reference) > tolerance
