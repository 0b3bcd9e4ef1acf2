"""The models on disk and the models in service: which versions, from when on, and until when.

    load → warm up → verify → swap → drain the old

What is served is only replaced by what was proven: a load that fails changes nothing but what is told of it.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Task
from rafaga.errors import BundleError, InvalidRequest, ModelNotFound, ModelNotReady
from rafaga.server.config.model_versions import Versions
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository.loader import Loader, is_plain
from rafaga.server.repository.plain_onnx import PlainModel

_LOG = logging.getLogger(__name__)

# How long a version that was replaced goes on taking requests: some had found it before, and decode their images yet.
_LINGER_S = 2.0
# How long what is queued in it may take then.
_DRAIN_S = 60.0

# In the place of names: all that there are.
EVERY_MODEL = "*"

# Names, sizes and times of a folder's files: when they change, its model is loaded anew.
Stamp = tuple[tuple[str, int, int], ...]


class State(Enum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"
    DOWN = "down"  # it was served, and lost its engine: a new one is being brought up


@dataclass(frozen=True)
class Slot:
    """One version of one model, in whatever state. `bundle` is None when its manifest could not be read.

    late: it came while the server was serving, so that its failure changes nothing for those who ask the others.
    state: ask `condition`, which knows of the engine.
    """

    name: str
    version: int
    folder: Path
    stamp: Stamp
    late: bool
    state: State = State.LOADING
    reason: str = ""
    bundle: Bundle | PlainModel | None = None
    model: ServedModel | None = None

    @property
    def condition(self) -> State:
        down = self.state is State.READY and self.model is not None and self.model.down
        return State.DOWN if down else self.state

    @property
    def why(self) -> str:
        """Why it is not served; empty when it is."""
        return "its engine was lost and is being restarted" if self.condition is State.DOWN else self.reason


class Repository:
    """`versions` of every model under `root`. `explicit`: only those that were asked for by name.

    Requests look models up without a lock: the table of a name is replaced, never changed. Changes go one at a time.
    """

    def __init__(
        self,
        root: Path,
        loader: Loader,
        metrics: Metrics,
        on_state: Callable[[str], None] = lambda _: None,
        versions: Versions | None = None,
        explicit: bool = False,
    ) -> None:
        self._root = root
        self._loader = loader
        self._metrics = metrics
        self._on_state = on_state  # the state of this model may have changed, by any thread
        self._versions = versions or Versions()
        self._explicit = explicit
        self._table: dict[str, tuple[Slot, ...]] = {}  # newest version first
        self._writing = threading.Lock()
        self._changing = threading.Lock()
        self._retiring: set[ServedModel] = set()
        self._serving = False
        self._closing = False

    @property
    def slots(self) -> list[Slot]:
        return sorted((s for slots in list(self._table.values()) for s in slots), key=lambda s: (s.name, s.version))

    def __contains__(self, name: str) -> bool:
        return name in self._table

    @property
    def ready(self) -> bool:
        """Every model that was there at the start is served: one that failed keeps the server from being ready.

        So does any that has lost its engine.
        """
        if not self._serving or self._closing:
            return False
        slots = self.slots
        some = self._explicit or any(slot.condition is State.READY for slot in slots)
        return some and all(s.condition is State.READY or (s.late and s.condition is not State.DOWN) for s in slots)

    def serves(self, name: str) -> bool:
        """Some version of this model."""
        return any(slot.condition is State.READY for slot in self._table.get(name, ()))

    @property
    def alive(self) -> bool:
        """False once only a new process helps: a model has lost its engines, and its device takes no new one."""
        return not any(slot.model is not None and slot.model.hopeless for slot in self.slots)

    def model(self, name: str, version: int, task: Task | None = None) -> ServedModel:
        """The served model for a request. `version` 0: the newest that is served.

        Raises ModelNotFound, ModelNotReady, or InvalidRequest when the model is for another task.
        """
        slot = self.slot(name, version)
        if slot.model is None:
            raise ModelNotReady(f"model {name!r} version {slot.version} is {slot.state.value}: ask another replica")
        if task is not None and slot.model.bundle.task is not task:
            its = slot.model.bundle.task or "requests of the Open Inference Protocol alone"
            raise InvalidRequest(f"model {name!r} is for {its}, this method for {task}")
        return slot.model

    def slot(self, name: str, version: int) -> Slot:
        """`version` 0: the newest that is served, or the newest where none is. Raises ModelNotFound."""
        slots = self._table.get(name)
        if slots is None:
            there = ", ".join(sorted(self._table)) or "none"
            raise ModelNotFound(f"no model {name[:63]!r}; there are: {there}")
        if not version:
            return next((slot for slot in slots if slot.model is not None), slots[0])
        for slot in slots:
            if slot.version == version:
                return slot
        there = ", ".join(str(slot.version) for slot in reversed(slots))
        raise ModelNotFound(
            f"model {name!r} has no version {version}; version{'s' if len(slots) > 1 else ''} {there} "
            f"{'are' if len(slots) > 1 else 'is'} served"
        )

    def versions(self, name: str) -> list[int]:
        """Those that are served, in rising order."""
        return [slot.version for slot in reversed(self._table.get(name, ())) if slot.model is not None]

    def load(self, names: tuple[str, ...] = ()) -> None:
        """At the start: all, or with explicit control those of `names`.

        A model that fails is reported and not served; the others are. Raises FileNotFoundError without a repository, or
        without one of `names`, or one that has a rule of versions of its own.
        """
        with self._changing:
            found = _scan(self._root)
            if names == (EVERY_MODEL,):
                names = tuple(found)
            asked = set(names) if self._explicit else self._versions.by_model.keys()
            if missing := sorted(asked - found.keys()):
                raise FileNotFoundError(f"no model {', '.join(missing)} in {self._root}")
            if self._explicit:
                found = {name: found[name] for name in names}
            for name in found:
                self._on_state(name)
            for name, folders in found.items():
                self._update(name, folders)
            self._serving = True

    def update(self) -> None:
        """Loads what is new or has changed on disk, and unloads what is gone. Raises FileNotFoundError as `load`."""
        with self._changing:
            found = _scan(self._root)
            for name, folders in found.items():
                self._update(name, folders)
            for name in self._table.keys() - found.keys():
                for model in self._remove(name):
                    self._retire(model, replaced=False)

    def load_model(self, name: str) -> None:
        """Loads what is new or has changed of one model, and tries again what failed.

        Raises ModelNotFound when it is not on disk, ModelNotReady when it is refused; what was served before still is.
        """
        with self._changing:
            folders = _scan(self._root).get(name)
            if folders is None:
                raise ModelNotFound(f"no model {name[:63]!r} in the repository")
            failed = self._update(name, folders, again=True)
        if failed:
            raise ModelNotReady(
                f"model {name!r} version {', '.join(map(str, failed))} was refused at load, and nothing has changed; "
                "the server's log has the cause"
            )

    def unload_model(self, name: str) -> None:
        """Returns when its requests are answered and its memory is free. Raises ModelNotFound."""
        with self._changing:
            self.slot(name, 0)
            models = self._remove(name)
        _LOG.info("model unloaded", extra={"model": name})
        for model in models:
            _finish(model, replaced=False)

    def on_disk(self) -> list[tuple[str, int]]:
        """Every version of every model in the repository, served or not."""
        return [(name, version) for name, folders in _scan(self._root).items() for version in sorted(folders)]

    def drain(self) -> None:
        with self._writing:
            self._closing = True
            for name, slots in self._table.items():
                self._table[name] = tuple(
                    dataclasses.replace(slot, state=State.DRAINING) if slot.model is not None else slot
                    for slot in slots
                )
        for slot in self.slots:
            if slot.model is not None:
                self._on_state(slot.name)
                self._metrics.model_ready(slot.name, slot.version, False)
                slot.model.drain()

    def close(self) -> None:
        with self._writing:
            self._closing = True
            models = [slot.model for slot in self.slots if slot.model is not None]
        for model in (*models, *list(self._retiring)):
            model.close()

    def _update(self, name: str, folders: Mapping[int, Path], again: bool = False) -> list[int]:
        """Brings one model to what is on disk; gives the versions that are refused. `again`: also tries those again."""
        wanted = self._versions.wanted(name, folders)
        for version in wanted:
            if version not in folders:
                self._miss(name, version)
                continue
            slot = self._version(name, version)
            try:
                stamp = _stamp(folders[version])
            except OSError as error:
                self._unreadable(name, version, folders[version], slot, error)
                continue
            if slot is None or slot.stamp != stamp or (again and slot.reason):
                self._load(Slot(name, version, folders[version], stamp, late=self._serving), slot)
        slots = self._table.get(name, ())
        # The others go once there is something to go to.
        if any(slot.model is not None for slot in slots if slot.version in wanted):
            for slot in slots:
                if slot.version not in wanted:
                    self._put(name, slot.version, None)
                    self._metrics.model_gone(name, slot.version)
                    if slot.model is not None:
                        self._retire(slot.model)
        return [slot.version for slot in self._table.get(name, ()) if slot.version in wanted and slot.reason]

    def _miss(self, name: str, version: int) -> None:
        """A version that was asked for by its number is not on disk, or not any more."""
        slot = self._version(name, version)
        if slot is not None and slot.model is None and not slot.stamp:
            return  # known
        folder, reason = self._root / name / str(version), "it is asked for by its number and not in the repository"
        self._lack(name, version, folder, reason, reason)
        if slot is not None and slot.model is not None:
            self._retire(slot.model, replaced=False)

    def _unreadable(self, name: str, version: int, folder: Path, slot: Slot | None, error: OSError) -> None:
        """A folder that may not be read, or went while it was looked at. What it held before, and the others, go on."""
        if slot is None:
            self._lack(name, version, folder, "its folder cannot be read; the server's log has the cause", error)
        elif slot.model is not None:
            about = {"model": name, "version": version}
            _LOG.error("the folder of a version cannot be read, it is served as before: %s", error, extra=about)

    def _lack(self, name: str, version: int, folder: Path, reason: str, cause: object) -> None:
        """A version with nothing that could be loaded. `cause` is for the log, `reason` for everybody."""
        self._put(name, version, Slot(name, version, folder, (), late=self._serving, state=State.FAILED, reason=reason))
        self._metrics.model_refused(name, version, still_served=False)
        _LOG.error("model not served: %s", cause, extra={"model": name, "version": version})

    def _load(self, slot: Slot, before: Slot | None) -> None:
        """Puts a new version, or a new state of one, into service; or tells why not, and leaves `before` there."""
        start = time.perf_counter()
        about: dict[str, object] = {"model": slot.name, "version": slot.version}
        old = None if before is None else before.model
        if old is None:
            self._put(slot.name, slot.version, slot)
        try:
            if is_plain(slot.folder):
                model = self._loader.load_plain(slot.folder)
                slot = dataclasses.replace(slot, bundle=model.bundle)
            else:
                bundle = bundles.load(slot.folder)
                slot = dataclasses.replace(slot, bundle=bundle)
                model = self._loader.load(slot.folder, bundle)
        except Exception as error:  # onnxruntime raises bare exceptions of many kinds
            reason = "the model was refused at load; the server's log has the cause"
            if before is not None and old is not None:
                reason = "what lies there now was refused at load; what was there before is served"
                slot = dataclasses.replace(before, stamp=slot.stamp, reason=reason)
            else:
                slot = dataclasses.replace(slot, state=State.FAILED, reason=reason)
            self._put(slot.name, slot.version, slot)  # first: whoever sees the count finds the reason
            self._metrics.model_refused(slot.name, slot.version, still_served=old is not None)
            _LOG.error("model not served: %s", error, extra=about, exc_info=not isinstance(error, BundleError))
            return
        model.start(partial(self._engine_changed, model))
        if not self._put(slot.name, slot.version, dataclasses.replace(slot, state=State.READY, model=model)):
            model.close()  # the server stops
            return
        seconds = time.perf_counter() - start
        self._metrics.model_loaded(slot.name, slot.version, seconds, model.metrics)
        _log_ready(model, about | {"seconds": round(seconds, 3)})
        if old is not None:
            self._retire(old)

    def _version(self, name: str, version: int) -> Slot | None:
        return next((slot for slot in self._table.get(name, ()) if slot.version == version), None)

    def _put(self, name: str, version: int, slot: Slot | None) -> bool:
        """Replaces one version's slot, or takes it out. False when the server stops: then nothing changes any more."""
        with self._writing:
            if self._closing:
                return False
            slots = [s for s in self._table.get(name, ()) if s.version != version]
            if slot is not None:
                slots.append(slot)
            self._table[name] = tuple(sorted(slots, key=lambda s: -s.version))
        self._on_state(name)
        return True

    def _engine_changed(self, model: ServedModel) -> None:
        """It lost its engine, or has a new one."""
        name = model.bundle.name
        with self._writing:
            slot = next((slot for slot in self._table.get(name, ()) if slot.model is model), None)
            if slot is None:
                return  # it ends anyway
            self._metrics.model_ready(name, slot.version, slot.condition is State.READY)
        self._on_state(name)

    def _remove(self, name: str) -> list[ServedModel]:
        """Takes a model out of service; gives what served it, which is the caller's to end."""
        with self._writing:
            if self._closing:
                return []
            slots = self._table.pop(name)
        self._on_state(name)
        for slot in slots:
            self._metrics.model_gone(name, slot.version)
        return [slot.model for slot in slots if slot.model is not None]

    def _retire(self, model: ServedModel, *, replaced: bool = True) -> None:
        """Lets a model that was taken out of service end in peace, in a thread of its own."""
        with self._writing:
            if self._closing:
                model.drain()
            self._retiring.add(model)
        start = time.perf_counter()

        def end() -> None:
            time.sleep(_LINGER_S)
            _finish(model, replaced)
            self._retiring.discard(model)
            self._metrics.model_swapped(model.bundle.name, time.perf_counter() - start)

        threading.Thread(target=end, name=f"retire-{model.bundle.name}", daemon=True).start()


class Poller:
    """Looks for changes in the repository every `interval_s`, in a thread of its own."""

    def __init__(self, repository: Repository, interval_s: float) -> None:
        self._repository = repository
        self._interval_s = interval_s
        self._stop = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="poll", daemon=True).start()

    def close(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self._repository.update()
            except Exception:  # a repository that is away for a moment: what is served stays
                _LOG.exception("the repository could not be read")


def _finish(model: ServedModel, replaced: bool) -> None:
    """Answers what was queued, then stops."""
    model.retire(replaced=replaced)
    end = time.monotonic() + _DRAIN_S
    while not model.idle and time.monotonic() < end:
        time.sleep(0.005)
    model.close()


def _log_ready(model: ServedModel, about: dict[str, object]) -> None:
    weights = model.bundle.weights
    about |= {"trained": weights.trained}
    if model.variant is None:
        _LOG.warning("model ready, UNVERIFIED: a plain ONNX file, so nothing is known of its answers", extra=about)
        return
    about |= {"precision": model.variant.precision}
    if weights.trained:
        _LOG.info("model ready", extra=about)
    else:
        _LOG.warning("model ready with RANDOM weights: its answers mean nothing", extra=about)


def _scan(root: Path) -> dict[str, dict[int, Path]]:
    """The folders of each model by version. Raises FileNotFoundError."""
    if not root.is_dir():
        raise FileNotFoundError(f"no model repository at {root}: `python -m export --output {root} NAME` makes one")
    found: dict[str, dict[int, Path]] = {}
    for parent in sorted(root.iterdir()):
        if not parent.is_dir() or not bundles.NAME_PATTERN.fullmatch(parent.name):
            continue
        try:
            versions = {
                int(p.name): p
                for p in parent.iterdir()
                if p.is_dir() and p.name.isascii() and p.name.isdecimal() and p.name[0] != "0"
            }
        except FileNotFoundError:
            continue  # it went while we looked
        if versions:
            found[parent.name] = versions
    return found


def _stamp(folder: Path) -> Stamp:
    files: list[tuple[str, int, int]] = []
    for path in sorted(folder.iterdir()):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # it went while we looked: the next look sees that it is gone
        files.append((path.name, status.st_size, status.st_mtime_ns))
    return tuple(files)
