"""From folders to models: real files, the real ONNX Runtime, and everything that keeps a bundle from being served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx.external_data_helper import convert_model_to_external_data

from rafaga import bundle as bundles
from rafaga.bundle import Precision
from rafaga.errors import BundleError, InvalidRequest, ModelNotFound, ModelNotReady
from rafaga.server.engines.selection import Placement
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository.loader import Loader
from rafaga.server.repository.repository import Repository
from rafaga.server.repository.versions import State
from rafaga.server.scheduling.batcher import BatchPolicy
from tests.bundles import publish_backbone, publish_classifier, publish_forecaster


def loader(precision: Precision | None = None, most: int = 4) -> Loader:
    return Loader(BatchPolicy(), most, precision, Placement(), Metrics())


def load(folder: Path, **about: Precision | int) -> ServedModel:
    return loader(**about).load(folder, bundles.load(folder))  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publish_classifier(tmp_path)


def rewrite(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Changes bundle.json, with checksums that agree with the files again."""
    manifest = json.loads((folder / bundles.MANIFEST).read_text())
    manifest["files"] = {name: bundles.sha256_of(folder / name) for name in manifest["files"]}
    change(manifest)
    (folder / bundles.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("publish", [publish_classifier, publish_backbone, publish_forecaster])
def test_good_bundles_are_loaded_and_warm(tmp_path: Path, publish: Callable[[Path], Path]) -> None:
    model = load(publish(tmp_path))
    assert model.max_batch_size == 4
    assert model.variant is not None
    assert model.variant.precision is Precision.FP32
    assert model.capacity_rows_per_s() > 0
    assert model.idle


def test_the_bundle_bounds_the_batch(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest.update(max_batch_size=2))
    assert load(folder).max_batch_size == 2


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz"])
def test_one_flipped_bit_is_found_and_the_file_named(folder: Path, file: str) -> None:
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(BundleError, match=f"{file}: sha256 is"):
        load(folder)


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(BundleError, match=f"{file}: missing"):
        load(folder)


def test_links_out_of_the_repository_are_not_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "model.onnx"
    (folder / "model.onnx").rename(elsewhere)
    (folder / "model.onnx").symlink_to(elsewhere)
    with pytest.raises(BundleError, match=r"model\.onnx: is a link to .*, outside the repository"):
        load(folder)


def test_a_variant_that_is_not_among_the_files(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest["files"].pop("model.onnx"))  # type: ignore[attr-defined]
    with pytest.raises(BundleError, match=r"model\.onnx is not listed"):
        load(folder)


def test_another_schema(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest.update(schema=99))
    with pytest.raises(BundleError, match="schema 99 is not supported"):
        load(folder)


def test_answers_that_are_not_pytorch_s(folder: Path) -> None:
    with np.load(folder / "golden.npz") as file:
        arrays = dict(file)
    arrays["output.probabilities"] = arrays["output.probabilities"][:, ::-1]
    np.savez(folder / "golden.npz", **arrays)
    rewrite(folder, lambda manifest: None)
    with pytest.raises(BundleError, match="golden outputs differ"):
        load(folder)


def test_tensors_in_other_files_are_refused(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save(model, folder / "model.onnx")
    rewrite(folder, lambda manifest: None)
    with pytest.raises(BundleError, match="external data"):
        load(folder)


def test_the_log_says_which_variant_was_chosen_and_why(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(folder / "model.onnx", folder / "model.int8.onnx")
    bundle = bundles.load(folder)
    faster = msgspec.structs.replace(
        bundle.variants[0], precision=Precision.INT8, file="model.int8.onnx", cpu_speedup=3.0, default_eligible=True
    )
    files = {**bundle.files, faster.file: bundles.sha256_of(folder / faster.file)}
    bundle = msgspec.structs.replace(bundle, variants=(*bundle.variants, faster), files=files)
    with caplog.at_level("INFO", "rafaga.server.repository.loader"):
        loader().load(folder, bundle).close()
    (record,) = (record for record in caplog.records if record.getMessage() == "variant chosen")
    assert {name: record.__dict__[name] for name in ("model", "precision", "why")} == {
        "model": "digits",
        "precision": "int8",
        "why": "3.0 times as fast as fp32 at export, kept its accuracy",
    }


def test_a_precision_that_was_not_published(folder: Path) -> None:
    with pytest.raises(BundleError, match="has no int8 variant, only fp32"):
        load(folder, precision=Precision.INT8)


class TestRepository:
    @pytest.fixture
    def repository(self, tmp_path: Path) -> Repository:
        """digits is good, broken has a flipped bit, torn no manifest, and the manifest of odd says another name."""
        broken = publish_classifier(tmp_path, "broken")
        content = bytearray((broken / "model.onnx").read_bytes())
        content[100] ^= 1
        (broken / "model.onnx").write_bytes(content)
        torn = publish_classifier(tmp_path, "torn")
        (torn / bundles.MANIFEST).unlink()
        shutil.copytree(publish_classifier(tmp_path, "digits").parent, tmp_path / "odd")
        shutil.copytree(tmp_path / "digits", tmp_path / "bad name")
        (tmp_path / "notes.txt").write_text("not a model")
        self.told: dict[str, bool] = {}

        def state_changed(name: str) -> None:
            if name:
                self.told[name] = repository.serves(name)

        repository = Repository(tmp_path, loader(), Metrics(), state_changed)
        repository.load()
        return repository

    def test_what_is_good_is_served_whatever_the_others_are(
        self, repository: Repository, caplog: pytest.LogCaptureFixture
    ) -> None:
        states = {entry.name: entry.state for entry in repository.versions}
        assert states == {
            "broken": State.FAILED,
            "digits": State.READY,
            "odd": State.FAILED,
            "torn": State.FAILED,
        }
        assert self.told == {"broken": False, "digits": True, "odd": False, "torn": False}
        assert not repository.ready
        assert repository.model("digits", 0, bundles.Task.CLASSIFICATION).bundle.name == "digits"
        repository.close()

    def test_the_log_says_which_file_and_callers_are_told_no_path(
        self, tmp_path: Path, repository: Repository, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(ModelNotReady, match="'broken' version 1 is failed") as error:
            repository.model("broken", 0)
        assert str(tmp_path) not in error.value.message
        reason = repository.version("broken", 0).reason
        assert reason
        assert str(tmp_path) not in reason
        repository.close()

    @pytest.mark.parametrize("name", ["nobody", "../digits", "digits/1", "", "bad name", "digits\x00", "dígits"])
    def test_names_that_are_none(self, repository: Repository, name: str) -> None:
        with pytest.raises(ModelNotFound):
            repository.model(name, 0)
        repository.close()

    def test_versions_and_tasks_that_it_has_not(self, repository: Repository) -> None:
        with pytest.raises(ModelNotFound, match="no version 7"):
            repository.model("digits", 7)
        with pytest.raises(InvalidRequest, match="is for classification, this method for forecasting"):
            repository.model("digits", 1, bundles.Task.FORECASTING)
        repository.close()

    def test_a_changed_file_is_named_in_the_log(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = publish_classifier(tmp_path)
        (folder / "golden.npz").write_bytes(b"something else")
        repository = Repository(tmp_path, loader(), Metrics())
        repository.load()
        repository.close()
        assert any("golden.npz" in record.getMessage() for record in caplog.records)
