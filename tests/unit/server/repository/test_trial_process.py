"""Models that end their process, never return or take all memory: their trial fails, and the next one passes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from rafaga import bundle as bundles
from rafaga.errors import BundleError
from rafaga.server.repository import trial as trials
from rafaga.server.repository.trial import Passed, Trial
from rafaga.server.repository.trial_process import DirectTrials, TrialFailed, TrialProcess, TrialStopped
from tests import plain
from tests.bundles import publish_classifier
from tests.integration.serving import PATIENCE_S, eventually


@pytest.fixture(scope="module")
def process() -> Iterator[TrialProcess]:
    process = TrialProcess()
    yield process
    process.close()


def trial(tmp_path: Path, model: onnx.ModelProto, seconds: float = PATIENCE_S) -> Trial:
    folder = plain.publish(tmp_path, "m", model).parent
    return Trial(path=str(folder), name="m", version=1, max_batch_size=8, seconds=seconds)


def child_of(process: TrialProcess) -> int:
    assert process._child is not None
    return process._child.pid


def test_a_plain_model_is_described_as_in_this_process(tmp_path: Path, process: TrialProcess) -> None:
    whole = trial(tmp_path, plain.scaled(2))
    passed = process.attempt(whole)
    assert passed == DirectTrials().attempt(whole)
    assert passed.sha256 == bundles.sha256_of(tmp_path / "m/1/model.onnx")
    assert passed.described is not None
    assert passed.recipe is not None
    assert passed.described.max_batch_size == 8
    assert [a.shape for a in passed.recipe.samples(passed.described.inputs).inputs] == [(3, 3)]


def test_a_bundle(tmp_path: Path, process: TrialProcess) -> None:
    folder = publish_classifier(tmp_path)
    bundle = bundles.load(folder)
    whole = Trial(path=str(folder), name="m", version=1, max_batch_size=8, bundle=bundle, file="model.onnx")
    assert process.attempt(whole) == Passed(sha256=bundle.files["model.onnx"], guards=())
    (folder / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"model\.onnx: sha256 is"):
        process.attempt(whole)


def test_a_crash_a_loop_without_end_and_a_refusal(tmp_path: Path, process: TrialProcess) -> None:
    """Each is the failure of its model alone: a good one passes afterwards."""
    with pytest.raises(TrialFailed, match="crashed \\(SIGFPE\\)"):
        process.attempt(trial(tmp_path / "crash", plain.crashing()))
    with pytest.raises(TrialFailed, match="took too long"):
        process.attempt(trial(tmp_path / "loop", plain.endless(), seconds=0.3))
    flat = plain.model("(float[n] x) => (float[m] y) { y = MaxPool<kernel_shape = [1]>(x) }")
    kept = child_of(process) if process.attempt(trial(tmp_path / "good", plain.scaled(2))) else 0
    with pytest.raises(BundleError, match="at least 3 dimensions"):
        process.attempt(trial(tmp_path / "bad", flat))
    process.attempt(trial(tmp_path / "good", plain.scaled(2)))
    assert child_of(process) == kept, "a refusal needs no new process"


def test_a_model_that_takes_all_memory(tmp_path: Path, process: TrialProcess) -> None:
    """Its allocation fails, also where the machine would allow it and kill a process later."""
    size = trials.available_memory() // 4
    model = plain.model("(float[3] x) => (float[m] y) { y = Expand(one, size) }", size=np.array([size]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "one"))
    with pytest.raises(BundleError, match="fails on inputs of the only shapes"):
        process.attempt(trial(tmp_path, model))


def test_it_works_where_no_file_is(tmp_path: Path, process: TrialProcess) -> None:
    process.attempt(trial(tmp_path, plain.scaled(2)))
    folder = Path(f"/proc/{child_of(process)}/cwd")
    assert list(folder.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        (folder / "file").touch()


def test_closing_it_ends_a_trial(tmp_path: Path) -> None:
    process = TrialProcess()
    failed = threading.Event()

    def attempt() -> None:
        with pytest.raises(TrialStopped):
            process.attempt(trial(tmp_path, plain.endless()))
        failed.set()

    thread = threading.Thread(target=attempt)
    thread.start()
    eventually(lambda: process._child, "the process is started")
    process.close()
    thread.join(PATIENCE_S)
    assert failed.is_set()
    process.close()


def test_a_killed_process_is_replaced(tmp_path: Path, process: TrialProcess) -> None:
    """As when memory runs out."""
    process.attempt(trial(tmp_path, plain.scaled(2)))
    os.kill(child_of(process), signal.SIGKILL)
    process._child and process._child.wait()
    process.attempt(trial(tmp_path, plain.scaled(2)))
