"""Whatever a folder of the repository holds, its neighbour is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import strategies as st

from rafaga.bundle import GOLDEN, MANIFEST, sha256_of
from rafaga.server.config.per_model import PerModel
from rafaga.server.engines.selection import Placement
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository import reconciler
from rafaga.server.repository.loader import Loader
from rafaga.server.repository.repository import Repository
from rafaga.server.repository.trial import Passed, Trial
from rafaga.server.repository.trial_process import TrialProcess
from rafaga.server.repository.versions import State
from rafaga.server.scheduling.batcher import BatchPolicy
from tests import bundles, plain
from tests.integration.test_fuzz import NIGHTLY, fuzz

MODEL = "model.onnx"
SAMPLES = "samples.json"


class HastyTrials(TrialProcess):
    """With little time for each, and one process for all."""

    def attempt(self, trial: Trial) -> Passed:
        return super().attempt(msgspec.structs.replace(trial, seconds=2.0))

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of versions that are served as they are, or crash, or never return."""
    root = tmp_path_factory.mktemp("originals")
    graphs = {
        "scaled": plain.scaled(2),
        "text": plain.identity("string", ("n", 2)),
        "divided": plain.model("(int64[n] a, int64[n] b) => (int64[n] c) { c = Div(a, b) }"),
        "spinning": plain.spinning(),
        "crashing": plain.crashing(),
        "endless": plain.endless(),
    }
    files = [plain.publish(root, name, graph) for name, graph in graphs.items()]
    (files[0].parent / SAMPLES).write_text('{"x": [2, 3]}')
    folders = [bundles.publish_classifier(root), bundles.publish_detector(root), bundles.publish_sequence_model(root)]
    return [*(file.parent for file in files), *folders]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    """Of a good model, whose name is the last."""
    monkeypatch.setattr(reconciler, "LINGER_S", 0.0)
    plain.publish(tmp_path, "neighbour", plain.scaled(3))
    trials, metrics = HastyTrials(), Metrics()
    loader = Loader(BatchPolicy(), 4, PerModel(None), Placement(), metrics, trials=trials)
    repository = Repository(tmp_path, loader, metrics)
    repository.load()
    yield repository
    repository.close()
    TrialProcess.close(trials)


def damaged(content: bytes, data: Callable[[st.SearchStrategy[int]], int]) -> bytes:
    """Some bytes are changed, removed, repeated or put in."""
    changed = bytearray(content)
    for _ in range(data(st.integers(0, 3))):
        at = data(st.integers(0, len(changed)))
        until = min(len(changed), at + data(st.sampled_from([0, 1, 1, 1, 2, 8, 100])))
        times = data(st.sampled_from([0, 1, 1, 1, 2, 10_000]))
        new = bytes([data(st.sampled_from([0, 1, 8, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))])
        changed[at:until] = new * times if data(st.booleans()) else changed[at:until] * times
    return bytes(changed)


def replace(path: Path, kind: int) -> None:
    """By something that is not a file, or by nothing."""
    path.unlink(missing_ok=True)
    targets = ["/dev/zero", "/etc/passwd", path]
    if kind < len(targets):
        path.symlink_to(targets[kind])
    elif kind == 3:
        os.mkfifo(path)
    elif kind == 4:
        path.mkdir()
    elif kind == 5:
        path.touch()
        os.truncate(path, 2**40)


def renew_checksums(folder: Path) -> None:
    """So that more than a wrong checksum is found."""
    files = [folder / name for name in (MANIFEST, MODEL, GOLDEN)]
    if any(file.is_symlink() or not file.is_file() or file.stat().st_size > 2**24 for file in files):
        return
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        manifest["files"] = {name: sha256_of(folder / name) for name in manifest["files"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("examples", [30, pytest.param(5_000, marks=NIGHTLY)])
def test_a_damaged_model_does_not_stop_its_neighbour(
    repository: Repository, originals: list[Path], tmp_path: Path, examples: int
) -> None:
    states: Counter[State] = Counter()

    def load(data: st.DataObject) -> None:
        original = data.draw(st.sampled_from(originals))
        shutil.rmtree(tmp_path / original.parent.name, ignore_errors=True)
        folder = tmp_path / original.parent.name / "1"
        shutil.copytree(original, folder)
        files = [file for file in (MANIFEST, MODEL, GOLDEN, SAMPLES) if (folder / file).exists()]
        for file in data.draw(st.lists(st.sampled_from(files), max_size=2, unique=True)):
            if data.draw(st.integers(0, 4)):
                (folder / file).write_bytes(damaged((folder / file).read_bytes(), data.draw))
            else:
                replace(folder / file, data.draw(st.integers(0, 6)))
        if (folder / MANIFEST).is_file() and data.draw(st.integers(0, 9)):
            renew_checksums(folder)
        os.utime(tmp_path / "neighbour" / "1" / MODEL)  # so that it is loaded again
        before = repository.version("neighbour", 1).model
        repository.update()
        after = repository.version("neighbour", 1)
        assert after.state is State.READY
        assert after.model is not before, "it was loaded after the other"
        (found,) = repository.of(folder.parent.name)
        assert found.state is State.READY or found.reason
        states[found.state] += 1

    fuzz(examples, st.data(), load)
    assert min(states[State.READY], states[State.FAILED]) > examples // 10, states
