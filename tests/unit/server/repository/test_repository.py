"""Which versions are in service after each change on disk, with models that load as the test says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rafaga.errors import BundleError, ModelNotFound, ModelNotReady
from rafaga.server.config.model_versions import VersionPolicy, Versions
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository import repository as repositories
from rafaga.server.repository.plain_onnx import PlainModel
from rafaga.server.repository.repository import Repository, State

GOOD, BAD = b"good", b"bad"
LATEST, ALL = Versions(), Versions(VersionPolicy(newest=None))


class FakeModel:
    """A ServedModel that only remembers what was done to it."""

    variant = None
    idle = True

    def __init__(self, name: str, version: int, metrics: Metrics) -> None:
        self.bundle = PlainModel(name, version, (), (), 0)
        self.metrics = metrics.model(name)
        self.life: list[str] = []

        self.down = self.hopeless = False
        self.tell: Callable[[], None] = lambda: None

    def start(self, tell: Callable[[], None]) -> None:
        self.life.append("start")
        self.tell = tell

    def engine(self, *, down: bool, hopeless: bool = False) -> None:
        self.down, self.hopeless = down, hopeless
        self.tell()

    def drain(self) -> None:
        self.life.append("drain")

    def retire(self, *, replaced: bool) -> None:
        self.life.append("replaced" if replaced else "gone")

    def close(self) -> None:
        self.life.append("close")


class FakeLoader:
    """Loads what contains GOOD."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.loaded: list[tuple[str, int]] = []
        self.models: list[FakeModel] = []

    def load_plain(self, folder: Path) -> Any:
        name, version = folder.parent.name, int(folder.name)
        self.loaded.append((name, version))
        if (folder / "model.onnx").read_bytes() != GOOD:
            raise BundleError("it is bad")
        self.models.append(FakeModel(name, version, self._metrics))
        return self.models[-1]


class Shelf:
    """A repository on disk, the Repository that serves it, and what health was told."""

    def __init__(self, root: Path, versions: Versions, explicit: bool = False) -> None:
        self.metrics = metrics = Metrics()
        self.root = root
        self.loader = FakeLoader(metrics)
        self.health: dict[str, bool] = {}
        self.repository = Repository(
            root,
            self.loader,  # type: ignore[arg-type]
            metrics,
            lambda name: self.health.__setitem__(name, self.repository.serves(name)),
            versions,
            explicit,
        )

    def put(self, name: str, version: int, content: bytes = GOOD) -> None:
        folder = self.root / name / str(version)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.onnx").write_bytes(content)

    def remove(self, name: str, version: int) -> None:
        (self.root / name / str(version) / "model.onnx").unlink()
        (self.root / name / str(version)).rmdir()

    @property
    def states(self) -> dict[tuple[str, int], State]:
        return {(slot.name, slot.version): slot.condition for slot in self.repository.slots}

    def failures(self, name: str, version: int) -> float | None:
        labels = {"model": name, "version": str(version)}
        return self.metrics.registry.get_sample_value("rafaga_model_load_failures_total", labels)

    @property
    def serving(self) -> list[tuple[str, int]]:
        return [(slot.name, slot.version) for slot in self.repository.slots if slot.model is not None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repositories, "_LINGER_S", 0.0)


@pytest.fixture
def latest(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path, LATEST)


@pytest.fixture
def every(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path, ALL)


def test_latest_loads_no_other(latest: Shelf) -> None:
    for version in (2, 9, 10):
        latest.put("a", version)
    latest.repository.load()
    assert latest.loader.loaded == [("a", 10)]
    assert latest.repository.slot("a", 0).version == 10
    assert latest.health == {"a": True}


def test_what_is_no_version_of_a_model_is_passed_over(latest: Shelf) -> None:
    for name, version in (("A", "1"), ("a", "01"), ("a", "0"), ("a", "x"), ("a", ".1-tmp"), ("a", "١"), ("-a", "1")):
        folder = latest.root / name / version
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(GOOD)
    (latest.root / "file").write_text("")
    latest.repository.load()
    assert latest.states == {}


def test_without_a_repository_there_is_nothing_to_serve(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model repository"):
        Shelf(tmp_path / "nowhere", LATEST).repository.load()


def test_an_unchanged_folder_is_not_loaded_again(latest: Shelf) -> None:
    latest.put("a", 1)
    latest.put("b", 1, BAD)
    latest.repository.load()
    for _ in range(3):
        latest.repository.update()
    assert latest.loader.loaded == [("a", 1), ("b", 1)]


def test_the_old_one_goes_when_the_new_one_serves(latest: Shelf) -> None:
    latest.put("a", 1)
    latest.repository.load()
    latest.put("a", 2, BAD)
    latest.repository.update()
    assert latest.states == {("a", 1): State.READY, ("a", 2): State.FAILED}
    assert latest.repository.slot("a", 0).version == 1
    assert (latest.repository.ready, latest.health) == (True, {"a": True})
    latest.put("a", 3)
    latest.repository.update()
    assert latest.states == {("a", 3): State.READY}


def test_the_last_version_goes_only_for_another(latest: Shelf) -> None:
    """1. The served version is gone from disk, the one before is bad: memory serves. 2. The whole model is gone."""
    latest.put("a", 1, BAD)
    latest.put("a", 2)
    latest.repository.load()
    latest.remove("a", 2)
    latest.repository.update()
    assert latest.serving == [("a", 2)]
    latest.remove("a", 1)
    (latest.root / "a").rmdir()
    latest.repository.update()
    assert latest.states == {}
    assert latest.health == {"a": False}


def test_all_versions_come_and_go_each_for_itself(every: Shelf) -> None:
    every.put("a", 1)
    every.put("a", 2)
    every.repository.load()
    assert every.repository.versions("a") == [1, 2]
    every.put("a", 3, BAD)
    every.remove("a", 1)
    every.repository.update()
    assert every.states == {("a", 2): State.READY, ("a", 3): State.FAILED}
    with pytest.raises(ModelNotReady, match="version 3 is failed"):
        every.repository.model("a", 3)
    with pytest.raises(ModelNotFound, match="no version 1"):
        every.repository.model("a", 1)


@pytest.mark.parametrize("versions", [LATEST, ALL], ids=["latest", "all"])
def test_a_failure_at_the_start_keeps_the_server_from_being_ready(tmp_path: Path, versions: Versions) -> None:
    shelf = Shelf(tmp_path, versions)
    shelf.put("a", 1)
    shelf.put("a", 2, BAD)
    shelf.put("b", 1)
    shelf.repository.load()
    assert not shelf.repository.ready
    shelf.put("a", 2)
    shelf.repository.update()
    assert shelf.repository.ready


def test_a_failure_later_does_not(latest: Shelf) -> None:
    latest.put("a", 1)
    latest.repository.load()
    latest.put("b", 1, BAD)
    latest.repository.update()
    assert latest.states == {("a", 1): State.READY, ("b", 1): State.FAILED}
    assert latest.repository.ready


def test_nothing_to_serve_is_not_ready_unless_nothing_was_asked_for(tmp_path: Path) -> None:
    asked, polled = Shelf(tmp_path, LATEST, explicit=True), Shelf(tmp_path, LATEST)
    for shelf in (asked, polled):
        assert not shelf.repository.ready  # not started
        shelf.repository.load()
    assert asked.repository.ready
    assert not polled.repository.ready


def test_a_load_that_ends_after_the_server_stopped_serves_nothing(latest: Shelf) -> None:
    latest.put("a", 1)
    latest.repository.load()
    load_plain = latest.loader.load_plain

    def while_stopping(folder: Path) -> Any:
        latest.repository.drain()
        latest.repository.close()
        return load_plain(folder)

    latest.loader.load_plain = while_stopping  # type: ignore[method-assign]
    latest.put("a", 2)
    latest.repository.update()
    old, new = latest.loader.models
    assert (old.life, new.life) == (["start", "drain", "close"], ["start", "close"])
    assert latest.states == {("a", 1): State.DRAINING, ("a", 2): State.LOADING}
    assert not latest.repository.ready


def test_unloading_ends_the_model_before_it_returns(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, ALL, explicit=True)
    shelf.put("a", 1)
    shelf.put("a", 2)
    shelf.repository.load()
    assert shelf.repository.on_disk() == [("a", 1), ("a", 2)]
    shelf.repository.load_model("a")
    shelf.repository.unload_model("a")
    assert [model.life for model in shelf.loader.models] == [["start", "gone", "close"]] * 2
    with pytest.raises(ModelNotFound):
        shelf.repository.unload_model("a")


def test_asking_again_tries_again_only_what_failed(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, ALL, explicit=True)
    shelf.put("a", 1)
    shelf.put("a", 2, BAD)
    shelf.repository.load()
    for _ in range(2):
        with pytest.raises(ModelNotReady, match="version 2 was refused"):
            shelf.repository.load_model("a")
    assert shelf.loader.loaded == [("a", 1), ("a", 2), ("a", 2)]


@pytest.mark.parametrize("late", [False, True])
def test_a_model_that_loses_its_engine_is_down_until_it_has_a_new_one(latest: Shelf, late: bool) -> None:
    """Of the whole server too, also when it came late: it was ready with that model."""
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
    assert "restarted" in latest.repository.slot("a", 1).why
    assert latest.repository.model("a", 0) is model  # its own refusal says more
    assert latest.repository.alive
    model.engine(down=True, hopeless=True)
    assert not latest.repository.alive
    model.engine(down=False)
    assert (latest.health["a"], latest.repository.ready) == (True, True)
    assert latest.states["a", 1] is State.READY


def test_a_model_that_was_replaced_turns_no_health(latest: Shelf) -> None:
    latest.put("a", 1)
    latest.repository.load()
    latest.put("a", 2)
    latest.repository.update()
    latest.loader.models[0].engine(down=True)
    assert (latest.health["a"], latest.repository.ready) == (True, True)


@pytest.fixture
def chosen(tmp_path: Path) -> Shelf:
    """1 and 3 of model a, the newest two of the others."""
    return Shelf(tmp_path, Versions.parse(["latest:2", "a=1,3"]))


def test_versions_by_their_numbers(chosen: Shelf) -> None:
    for version in (1, 2, 3, 4):
        chosen.put("a", version)
        chosen.put("b", version)
    chosen.repository.load()
    assert chosen.serving == [("a", 1), ("a", 3), ("b", 3), ("b", 4)]
    assert chosen.repository.ready
    assert chosen.repository.slot("a", 0).version == 3
    with pytest.raises(ModelNotFound, match="has no version 4; versions 1, 3 are served"):
        chosen.repository.model("a", 4)
    chosen.put("a", 5)
    chosen.put("b", 5)
    chosen.repository.update()
    assert chosen.serving == [("a", 1), ("a", 3), ("b", 4), ("b", 5)]


def test_a_version_that_is_asked_for_and_not_there(chosen: Shelf) -> None:
    """Not ready, and the catalogue says why; it is served once it comes."""
    chosen.put("a", 1)
    chosen.repository.load()
    assert chosen.serving == [("a", 1)]
    assert not chosen.repository.ready
    assert chosen.states["a", 3] is State.FAILED
    assert "not in the repository" in chosen.repository.slot("a", 3).why
    assert chosen.failures("a", 3) == 1
    chosen.repository.update()
    assert chosen.failures("a", 3) == 1  # said once
    chosen.put("a", 3)
    chosen.repository.update()
    assert chosen.serving == [("a", 1), ("a", 3)]
    assert chosen.repository.ready


def test_a_version_that_is_asked_for_and_goes(chosen: Shelf) -> None:
    for version in (1, 3):
        chosen.put("a", version)
    chosen.repository.load()
    chosen.remove("a", 3)
    chosen.repository.update()
    assert chosen.serving == [("a", 1)]
    assert chosen.states["a", 3] is State.FAILED
    assert chosen.repository.ready, "it came and went while the server served"


def test_a_model_with_a_rule_of_its_own_must_be_there(chosen: Shelf) -> None:
    chosen.put("b", 1)
    with pytest.raises(FileNotFoundError, match="no model a in"):
        chosen.repository.load()


def test_an_admin_loads_versions_by_their_numbers(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, Versions.parse(["a=1,3"]), explicit=True)
    for version in (1, 2):
        shelf.put("a", version)
    shelf.repository.load()
    with pytest.raises(ModelNotReady, match="version 3 was refused"):
        shelf.repository.load_model("a")
    assert shelf.serving == [("a", 1)]
    shelf.put("a", 3)
    shelf.repository.load_model("a")
    assert shelf.serving == [("a", 1), ("a", 3)]


def test_a_folder_that_cannot_be_read_costs_no_other_model(
    latest: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """1. One of three folders may not be read: the others are served, and the server is not ready. 2. Then it may be.
    3. What is served already stays so when its folder cannot be read any more."""
    for name in ("a", "b", "c"):
        latest.put(name, 1)
    closed = {"b"}
    stamp = repositories._stamp

    def look(folder: Path) -> Any:
        if folder.parent.name in closed:
            raise PermissionError(f"denied: {folder}")
        return stamp(folder)

    monkeypatch.setattr(repositories, "_stamp", look)
    latest.repository.load()
    assert latest.serving == [("a", 1), ("c", 1)]
    assert latest.states["b", 1] is State.FAILED
    assert not latest.repository.ready
    with pytest.raises(ModelNotReady):
        latest.repository.load_model("b")
    closed.clear()
    latest.repository.update()
    assert latest.serving == [("a", 1), ("b", 1), ("c", 1)]
    closed.add("a")
    latest.repository.update()
    assert latest.serving == [("a", 1), ("b", 1), ("c", 1)]
    assert "it is served as before: denied" in caplog.text


def test_a_model_whose_folder_cannot_be_read_is_not_taken_for_gone(
    latest: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    latest.put("a", 1)
    latest.repository.load()
    look = Path.iterdir

    def closed(folder: Path) -> Any:
        if folder.name == "a":
            raise PermissionError(f"denied: {folder}")
        return look(folder)

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(PermissionError):
        latest.repository.update()
    assert latest.serving == [("a", 1)]
