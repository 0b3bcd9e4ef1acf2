"""The versions of each model: their states, the lookup that every request makes, and whether the server is ready."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from rafaga.bundle import Bundle, Task
from rafaga.errors import InvalidRequest, ModelNotFound, ModelNotReady, listed, quoted
from rafaga.plain_model import PlainModel
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.repository.discovery import Stamp

# How long a load takes is unknown; asking once a second costs little.
_RETRY_AFTER_S = 1.0


class State(Enum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"
    DOWN = "down"  # it was served, then lost its engine; a new engine is being started


@dataclass(frozen=True)
class ModelVersion:
    """One version of one model. `bundle` is None if its manifest could not be read, `model` if it is not served.

    stamp: of its folder when it was loaded or refused; empty if it is not on disk.
    late: it appeared while the server was running, so its failure does not make the server unready.
    state: as of the last change in the repository; `condition` also covers a lost engine.
    """

    name: str
    version: int
    late: bool
    stamp: Stamp = ()
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
        """Why it is not served; empty if it is."""
        return "its engine was lost and is being restarted" if self.condition is State.DOWN else self.reason

    @property
    def about(self) -> dict[str, object]:
        """For the log."""
        return {"model": self.name, "version": self.version}


class VersionTable:
    """Lookups take no lock: the tuple of a name, and `in_service`, are replaced, never changed.

    Every signal of readiness (grpc.health, /readyz, the Open Inference Protocol, the catalogue) comes from here, so
    they never disagree.

    `on_change` gets the name of a model whose state may have changed, or "" for that of the server, from any thread.
    in_service: the served models by name and version; version 0 is the newest that is served.
    explicit: only models that were asked for by name are loaded, perhaps none. scanned, loaded: what the start has
    done; progress: what it is doing.
    """

    def __init__(self, on_change: Callable[[str], None], explicit: bool = False) -> None:
        self._by_name: dict[str, tuple[ModelVersion, ...]] = {}  # newest version first
        self.in_service: Mapping[tuple[str, int], ServedModel] = {}
        self.on_change = on_change
        self.explicit = explicit
        self.lock = threading.Lock()
        self.frozen = self.scanned = self.loaded = False
        self.progress = "the server is starting"

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def names(self) -> list[str]:
        return sorted(self._by_name)

    @property
    def versions(self) -> list[ModelVersion]:
        """All that are known, served or not, by name and version."""
        return sorted((v for vs in list(self._by_name.values()) for v in vs), key=lambda v: (v.name, v.version))

    def of(self, name: str) -> tuple[ModelVersion, ...]:
        """Newest first; empty for an unknown name."""
        return self._by_name.get(name, ())

    def get(self, name: str, version: int) -> ModelVersion | None:
        return next((v for v in self.of(name) if v.version == version), None)

    @property
    def ready(self) -> bool:
        """False until everything that was there at the start is served, and while any model has lost its engine."""
        return not self.unready_because

    @property
    def unready_because(self) -> str:
        """Why the server is not ready, without paths; empty if it is."""
        if self.frozen:
            return "the server is stopping"
        if not self.loaded:
            return self.progress
        versions = self.versions
        if not versions and not self.explicit:
            return "no model found in the repository; see the server's log for what is expected"
        missing = [
            f"{v.name} version {v.version} is {v.condition.value}{f' ({v.why})' if v.why else ''}"
            for v in versions
            if v.condition is not State.READY and (not v.late or v.condition is State.DOWN)
        ]
        if missing:
            return listed(missing, most_characters=2000)
        if self.explicit or any(v.condition is State.READY for v in versions):
            return ""
        return "no model is served"

    @property
    def alive(self) -> bool:
        """False if the process must be restarted: a model lost its engines, and its device accepts no new one."""
        return not any(v.model is not None and v.model.unrecoverable for v in self.versions)

    def serves(self, name: str) -> bool:
        """Whether any version of this model is ready."""
        return any(v.condition is State.READY for v in self.of(name))

    def served_versions(self, name: str) -> list[int]:
        """In rising order."""
        return [v.version for v in reversed(self.of(name)) if v.model is not None]

    def require_names(self) -> None:
        """Raises ModelNotReady before the repository was read at the start: until then no name is known."""
        if not self.scanned:
            raise ModelNotReady("the server is starting: its models are not known yet", _RETRY_AFTER_S)

    def version(self, name: str, version: int) -> ModelVersion:
        """`version` 0: the newest that is served, or the newest if none is.

        Raises ModelNotFound, and ModelNotReady as `require_names`.
        """
        self.require_names()
        versions = self._by_name.get(name)
        if versions is None:
            raise ModelNotFound(f"no model {quoted(name)}; available: {listed(self.names) or 'none'}")
        for candidate in versions:
            if candidate.version == version or (not version and candidate.model is not None):
                return candidate
        if not version:
            return versions[0]
        available = listed(v.version for v in reversed(versions))
        raise ModelNotFound(f"model {name!r} has no version {version}; available: {available}")

    def model(self, name: str, version: int, task: Task | None = None) -> ServedModel:
        """The served model for a request. `version` 0: the newest that is served.

        Raises ModelNotFound, ModelNotReady, or InvalidRequest if the model is for another task.
        """
        found = self.version(name, version)
        if found.model is None:
            what = f"model {name!r} version {found.version} is {found.state.value}"
            if found.state is State.LOADING:
                raise ModelNotReady(f"{what}: ask another replica or retry later", _RETRY_AFTER_S)
            raise ModelNotReady(f"{what}: ask another replica")
        if task is not None and found.model.bundle.task is not task:
            its = found.model.bundle.task or "the Open Inference Protocol only"
            raise InvalidRequest(f"model {name!r} is for {its}, this method for {task}")
        return found.model

    def put(self, entry: ModelVersion) -> bool:
        """Adds or replaces one version. False once the table is frozen: then nothing changes."""
        return self._replace(entry.name, entry.version, (entry,))

    def discard(self, name: str, version: int) -> bool:
        """Removes one version. False once the table is frozen."""
        return self._replace(name, version, ())

    def _replace(self, name: str, version: int, new: tuple[ModelVersion, ...]) -> bool:
        with self.lock:
            if self.frozen:
                return False
            others = (v for v in self.of(name) if v.version != version)
            self._by_name[name] = tuple(sorted((*others, *new), key=lambda v: -v.version))
            self._index()
        self.on_change(name)
        return True

    def _index(self) -> None:
        """Lock held."""
        oldest_first = (v for versions in self._by_name.values() for v in reversed(versions))
        served = [(v.name, v.version, v.model) for v in oldest_first if v.model is not None]
        self.in_service = {(name, number): model for name, version, model in served for number in (0, version)}

    def pop(self, name: str) -> tuple[ModelVersion, ...]:
        """Removes a model. Empty once the table is frozen."""
        with self.lock:
            if self.frozen:
                return ()
            versions = self._by_name.pop(name)
            self._index()
        self.on_change(name)
        return versions

    def freeze(self) -> list[ModelVersion]:
        """Marks all that is served as draining, and allows no more changes. Returns those versions."""
        with self.lock:
            self.frozen = True
            for name, versions in self._by_name.items():
                self._by_name[name] = tuple(
                    v if v.model is None else dataclasses.replace(v, state=State.DRAINING) for v in versions
                )
        return [v for v in self.versions if v.model is not None]
