"""From folders to models: real files, the real ONNX Runtime, and everything that keeps a bundle from being served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx.external_data_helper import convert_model_to_external_data

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Precision
from rafaga.errors import BundleError
from rafaga.server.config.per_model import PerModel
from rafaga.server.engines.selection import Placement
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository.loader import Loader
from rafaga.server.scheduling.batcher import BatchPolicy
from tests.bundles import publish_classifier


def load(folder: Path, bundle: Bundle | None = None) -> ServedModel:
    loader = Loader(BatchPolicy(), 4, PerModel(None), Placement(), Metrics())
    return loader.load(folder, bundle or bundles.load(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publish_classifier(tmp_path)


def rewrite_checksums(folder: Path) -> None:
    manifest = json.loads((folder / bundles.MANIFEST).read_text())
    manifest["files"] = {name: bundles.sha256_of(folder / name) for name in manifest["files"]}
    (folder / bundles.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz"])
def test_one_flipped_bit_is_found_and_the_file_named(folder: Path, file: str) -> None:
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(BundleError, match=f"{file}: sha256 is"):
        load(folder)


def test_answers_that_are_not_pytorch_s(folder: Path) -> None:
    with np.load(folder / "golden.npz") as file:
        arrays = dict(file)
    arrays["output.probabilities"] = arrays["output.probabilities"][:, ::-1]
    np.savez(folder / "golden.npz", **arrays)
    rewrite_checksums(folder)
    with pytest.raises(BundleError, match="golden outputs differ"):
        load(folder)


def test_tensors_in_other_files_are_refused(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save(model, folder / "model.onnx")
    rewrite_checksums(folder)
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
        load(folder, bundle=bundle).close()
    (record,) = (record for record in caplog.records if record.getMessage() == "engine chosen")
    assert {name: record.__dict__[name] for name in ("model", "engine", "precision", "why")} == {
        "model": "digits",
        "engine": "onnxruntime",
        "precision": "int8",
        "why": "3.0 times as fast as fp32 at export, kept its accuracy",
    }
