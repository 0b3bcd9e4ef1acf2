"""A repository in which most is broken or hostile: the rest is served, and each failure is that model's alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rafaga.bundle import MANIFEST, sha256_of
from rafaga.v1 import catalog_pb2
from tests import bundles, plain
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, eventually, get
from tests.process.running import Process, running

IMAGE = messages.random_digits(0)

# What the log says of each.
CAUSES = {
    "crash": "crashed (SIGFPE)",
    "fifo": "bundle.json: missing, or not a file",
    "fifo-model": "model.onnx: missing, or not a file",
    "varint": "not an ONNX model",
    "bomb": "an array of shape",
    "device": "outside the repository",
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    plain.publish(root, "crash", plain.crashing())
    varint = plain.publish(root, "varint", plain.scaled(2))
    varint.write_bytes(b"\x0a" + b"\x80" * 3_000_000)
    for name in ("fifo", "fifo-model", "device"):
        (root / name / "1").mkdir(parents=True)
    os.mkfifo(root / "fifo/1/bundle.json")
    shutil.copy(varint, root / "fifo/1/model.onnx")
    os.mkfifo(root / "fifo-model/1/model.onnx")
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "device/1/model.onnx").symlink_to(tmp_path / "secret")
    folder = bundles.publish_classifier(root, name="bomb")
    with (
        zipfile.ZipFile(folder / "golden.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("input.image.npy", "w") as member,
    ):
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (2**40,)})
        member.write(bytes(2**20))
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["files"]["golden.npz"] = sha256_of(folder / "golden.npz")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    bundles.publish_classifier(root, name="whole")  # the last by name
    return root


def test_each_failure_is_that_model_s_alone(repository: Path) -> None:
    with running(repository) as served:
        served.vision.Classify(messages.classify(IMAGE, "whole"), timeout=PATIENCE_S)
        models = served.catalog.ListModels(catalog_pb2.ListModelsRequest(), timeout=PATIENCE_S).models
        code, why = get(f"{served.http}/readyz")
        log = served.process.log
        assert served.process.end() == 0
    refused = {line.fields["model"]: line.text for line in log if line.fields["message"].startswith("model not served")}
    assert refused.keys() == CAUSES.keys()
    assert [name for name, cause in CAUSES.items() if cause not in refused[name]] == [], refused
    assert not any("Traceback" in line.text for line in log)
    states = {model.name: model for model in models}
    assert states["whole"].state == catalog_pb2.Model.READY
    for name in CAUSES:
        assert states[name].state == catalog_pb2.Model.FAILED
        assert states[name].reason.startswith("the model was refused at load; ")
        assert f"{name} version 1 is failed" in why
        assert str(repository) not in states[name].reason + why
    assert "crashed (SIGFPE)" in states["crash"].reason
    assert code == 503


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_trial_that_never_ends_ends_with_its_server(tmp_path: Path, number: signal.Signals, code: int) -> None:
    plain.publish(tmp_path, "endless", plain.endless())
    with Process("--repository", str(tmp_path), "--drain-delay-s", "0") as started:
        started.wait_for("loading model")
        eventually(lambda: children(started.pid), "the trial begins")
        (child,) = children(started.pid)
        assert started.end(number) == code
    eventually(lambda: not Path(f"/proc/{child}/cwd").exists(), "the trial ends")
    assert not any(line.fields.get("level") in ("ERROR", "CRITICAL") for line in started.log)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]
