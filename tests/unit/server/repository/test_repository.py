"""The versions in service after each change on disk, with a fake loader."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rafaga.errors import BundleError, ModelNotFound, ModelNotReady
from rafaga.plain_model import PlainModel
from rafaga.server.config.model_versions import VersionPolicy, Versions, parse_versions
from rafaga.server.engines.runtimes import Runtime
from rafaga.server.observability.metrics import BatchRecord, Metrics
from rafaga.server.repository import reconciler
from rafaga.server.repository.repository import Repository
from rafaga.server.repository.trial_process import DirectTrials
from rafaga.server.repository.versions import State

GOOD, BAD = b"good", b"bad"
NOBODY = 65534
LATEST, ALL = Versions(VersionPolicy()), Versions(VersionPolicy(newest=None))


class FakeModel:
    """A ServedModel that records the calls it gets."""

    runtime = Runtime()
    idle = True

    def __init__(self, name: str, version: int, metrics: Metrics) -> None:
        self.bundle = PlainModel(name, version, (), (), 0)
        self.metrics = metrics.model(name)
        self.life: list[str] = []
        self.down = self.unrecoverable = False
        self.changed: Callable[[], None] = lambda: None

    def start(self, changed: Callable[[], None]) -> None:
        self.life.append("start")
        self.changed = changed

    def engine(self, *, down: bool, unrecoverable: bool = False) -> None:
        self.down, self.unrecoverable = down, unrecoverable
        self.changed()

    def drain(self) -> None:
        self.life.append("drain")

    def retire(self, *, replaced: bool) -> None:
        self.life.append("replaced" if replaced else "gone")

    def close(self) -> None:
        self.life.append("close")


class FakeLoader:
    """Loads files that contain GOOD, and refuses others; `before` is called with the name of each model."""

    trials = DirectTrials()

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.loaded: list[tuple[str, int]] = []
        self.models: list[FakeModel] = []
        self.before: Callable[[str], object] = lambda name: None

    def load_plain(self, folder: Path, name: str, version: int) -> Any:
        self.before(name)
        self.loaded.append((name, version))
        if (folder / "model.onnx").read_bytes() != GOOD:
            raise BundleError("it is bad")
        self.models.append(FakeModel(name, version, self._metrics))
        return self.models[-1]


class Harness:
    """A repository on disk, the Repository that serves it, and the health that it reported."""

    def __init__(self, root: Path, versions: Versions, explicit: bool = False) -> None:
        self.metrics = metrics = Metrics()
        self.root = root
        self.loader = loader = FakeLoader(metrics)
        self.health: dict[str, bool] = {}
        self.repository = Repository(root, loader, metrics, self.state_changed, versions, explicit)  # type: ignore[arg-type]

    def state_changed(self, name: str) -> None:
        if name:
            self.health[name] = self.repository.serves(name)

    def put(self, name: str, version: int, content: bytes = GOOD) -> None:
        folder = self.root / name / str(version)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.onnx").write_bytes(content)

    @property
    def states(self) -> dict[tuple[str, int], State]:
        return {(entry.name, entry.version): entry.condition for entry in self.repository.versions}

    def failures(self, name: str, version: int) -> float | None:
        labels = {"model": name, "version": str(version)}
        return self.metrics.registry.get_sample_value("rafaga_model_load_failures_total", labels)

    def series(self, name: str) -> int:
        """How many samples of the metrics are about this model."""
        families = self.metrics.registry.collect()
        return sum(sample.labels.get("model") == name for family in families for sample in family.samples)

    @property
    def serving(self) -> list[tuple[str, int]]:
        return [(entry.name, entry.version) for entry in self.repository.versions if entry.model is not None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler, "LINGER_S", 0.0)


@pytest.fixture
def latest(tmp_path: Path) -> Harness:
    return Harness(tmp_path, LATEST)


def test_an_unchanged_folder_is_not_loaded_again(latest: Harness) -> None:
    latest.put("a", 1)
    latest.put("b", 1, BAD)
    latest.repository.load()
    for _ in range(3):
        latest.repository.update()
    assert latest.loader.loaded == [("a", 1), ("b", 1)]


def test_the_last_served_version_is_only_removed_for_another(latest: Harness) -> None:
    """1. The served version is removed, the one before is bad: it still serves. 2. The whole model is removed."""
    latest.put("a", 1, BAD)
    latest.put("a", 2)
    latest.repository.load()
    shutil.rmtree(latest.root / "a/2")
    latest.repository.update()
    assert latest.serving == [("a", 2)]
    shutil.rmtree(latest.root / "a")
    latest.repository.update()
    assert latest.states == {}
    assert latest.health == {"a": False}


def test_what_is_being_loaded_is_known_before(latest: Harness) -> None:
    """1. Before the repository is read no name can be judged. 2. While `a` loads, `b` is known as being loaded, and why
    the server is not ready says how far it is. 3. A folder without files is refused, not loaded for ever."""
    latest.put("a", 1)
    latest.put("b", 1)
    latest.put("c", 1, BAD)
    (latest.root / "empty" / "1").mkdir(parents=True)
    seen = []

    def look(name: str) -> None:
        seen.append((latest.states, latest.repository.unready_because))
        if name == "a":
            with pytest.raises(ModelNotReady, match="version 1 is loading") as error:
                latest.repository.model("b", 0)
            assert error.value.retry_after_s == 1.0
            with pytest.raises(ModelNotFound):
                latest.repository.model("unknown", 0)

    latest.loader.before = look
    for ask in (partial(latest.repository.model, "a", 0), latest.repository.require_names):
        with pytest.raises(ModelNotReady, match="not known yet"):
            ask()
    latest.repository.load()
    assert seen[0] == (dict.fromkeys(latest.states, State.LOADING), "loading model a (1 of 4)")
    ready, failed = State.READY, State.FAILED
    assert latest.states == {("a", 1): ready, ("b", 1): ready, ("c", 1): failed, ("empty", 1): failed}


def test_a_load_at_the_start_ends_between_models(latest: Harness) -> None:
    for name in ("a", "b", "c"):
        latest.put(name, 1)
    latest.loader.before = lambda name: latest.repository.withdraw()
    latest.repository.load()
    assert latest.loader.loaded == [("a", 1)]
    assert not latest.repository.ready


def test_a_load_that_ends_after_the_stop_is_discarded(latest: Harness) -> None:
    latest.put("a", 1)
    latest.repository.load()
    latest.loader.before = lambda name: (latest.repository.drain(), latest.repository.close())  # type: ignore[func-returns-value]
    latest.put("a", 2)
    latest.repository.update()
    old, new = latest.loader.models
    assert (old.life, new.life) == (["start", "drain", "close"], ["start", "close"])
    assert latest.states == {("a", 1): State.DRAINING, ("a", 2): State.LOADING}
    assert not latest.repository.ready


@pytest.mark.parametrize("explicit", [True, False])
def test_an_unloaded_model_leaves_no_metrics(tmp_path: Path, explicit: bool) -> None:
    """Unloaded by an admin, or removed from disk, even if it failed to load. Other models keep theirs."""
    harness = Harness(tmp_path, ALL, explicit)
    for name, content in (("a", GOOD), ("b", GOOD), ("c", BAD)):
        harness.put(name, 1, content)
    harness.put("a", 2)
    harness.repository.load(("a", "b", "c") if explicit else ())
    for model in harness.loader.models:
        model.metrics.batches.append(BatchRecord(1, 0.1, [0.1]))
        model.metrics.dropped("deadline", 1)
        model.metrics.preprocess_seconds.append(0.1)
    assert harness.series("a") > 50
    assert harness.series("c") > 0
    if explicit:
        harness.repository.unload_model("a")
        harness.repository.unload_model("c")
    else:
        for name in ("a", "c"):
            shutil.rmtree(harness.root / name)
        harness.repository.update()
        for thread in threading.enumerate():
            if thread.name == "retire-a":
                thread.join(60)
    assert (harness.series("a"), harness.series("c")) == (0, 0)
    assert harness.series("b") > 50
    assert harness.serving == [("b", 1)]


@pytest.mark.parametrize("late", [False, True])
def test_a_model_is_down_until_its_engine_is_replaced(latest: Harness, late: bool) -> None:
    """The server is not ready either, even if the model was added after the start."""
    if late:
        latest.put("b", 1)
        latest.repository.load()
    latest.put("a", 1)
    latest.repository.update() if late else latest.repository.load()
    model = latest.loader.models[-1]
    assert (latest.health["a"], latest.repository.ready) == (True, True)
    model.engine(down=True)
    assert (latest.health["a"], latest.repository.ready) == (False, False)
    assert latest.states["a", 1] is State.DOWN
    assert "restarted" in latest.repository.version("a", 1).why
    assert latest.repository.model("a", 0) is model  # it refuses requests with the reason
    assert latest.repository.alive
    model.engine(down=True, unrecoverable=True)
    assert not latest.repository.alive
    model.engine(down=False)
    assert (latest.health["a"], latest.repository.ready) == (True, True)
    assert latest.states["a", 1] is State.READY


def test_a_replaced_model_does_not_change_health(latest: Harness) -> None:
    for version in (1, 2):
        latest.put("a", version)
        latest.repository.update() if version > 1 else latest.repository.load()
    latest.loader.models[0].engine(down=True)
    assert (latest.health["a"], latest.repository.ready) == (True, True)


@pytest.fixture
def chosen(tmp_path: Path) -> Harness:
    """Versions 1 and 3 of model a, the two newest of other models."""
    return Harness(tmp_path, parse_versions(["latest:2", "a=1", "3"]))


def test_specific_versions(chosen: Harness) -> None:
    for version in (1, 2, 3, 4):
        chosen.put("a", version)
        chosen.put("b", version)
    chosen.repository.load()
    assert chosen.serving == [("a", 1), ("a", 3), ("b", 3), ("b", 4)]
    assert chosen.repository.ready
    assert chosen.repository.version("a", 0).version == 3
    with pytest.raises(ModelNotFound, match="has no version 4; available: 1, 3"):
        chosen.repository.model("a", 4)
    chosen.put("a", 5)
    chosen.put("b", 5)
    chosen.repository.update()
    assert chosen.serving == [("a", 1), ("a", 3), ("b", 4), ("b", 5)]


def test_a_specific_version_that_is_missing(chosen: Harness) -> None:
    """1. A model with a rule of its own must exist. 2. Where one of its versions is missing, the server is not ready,
    and the catalogue says why, once. 3. The version is served as soon as it is there."""
    chosen.put("b", 1)
    with pytest.raises(FileNotFoundError, match="no model a in"):
        chosen.repository.load()
    chosen.put("a", 1)
    chosen.repository.load()
    chosen.repository.update()
    assert chosen.serving == [("a", 1), ("b", 1)]
    assert not chosen.repository.ready
    assert chosen.states["a", 3] is State.FAILED
    assert "not in the repository" in chosen.repository.version("a", 3).why
    assert chosen.failures("a", 3) == 1
    chosen.put("a", 3)
    chosen.repository.update()
    assert chosen.serving == [("a", 1), ("a", 3), ("b", 1)]
    assert chosen.repository.ready


@pytest.fixture
def another_user(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Permissions matter only without root: root reads everything."""
    with tempfile.TemporaryDirectory() as folder:
        if root := os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.parametrize("closed", ["a", "a/1"])
def test_a_folder_without_permission_fails_alone(
    another_user: Path, closed: str, caplog: pytest.LogCaptureFixture
) -> None:
    """1. It is not served, the other is, and the server is not ready. 2. It becomes readable. 3. The permission is
    taken away again: what was loaded from it is still served."""
    found = Harness(another_user, LATEST)
    for name in ("a", "b"):
        found.put(name, 1)
    (another_user / closed).chmod(0)
    try:
        found.repository.load()
        assert found.states == {("a", 1): State.FAILED, ("b", 1): State.READY}
        assert "a version 1 is failed (its folder cannot be read" in found.repository.unready_because
        with pytest.raises(ModelNotReady):
            found.repository.load_model("a")
        for mode in (0o700, 0):
            (another_user / closed).chmod(mode)
            found.repository.update()
            assert found.states == {("a", 1): State.READY, ("b", 1): State.READY}
        assert "it is served as before: " in caplog.text
    finally:
        (another_user / closed).chmod(0o700)
