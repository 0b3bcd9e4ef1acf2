"""The versions of each model, their states, and the lookup that every request makes."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from rafaga.bundle import Bundle
from rafaga.errors import ModelNotFound, listed, quoted
from rafaga.plain_model import PlainModel
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.repository.discovery import Stamp


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
    """Lookups take no lock: the tuple of a name is replaced, never changed.

    `on_change` gets the name of a model whose state may have changed, or "" for that of the server, from any thread.
    """

    def __init__(self, on_change: Callable[[str], None]) -> None:
        self._by_name: dict[str, tuple[ModelVersion, ...]] = {}  # newest version first
        self.on_change = on_change
        self.lock = threading.Lock()
        self.frozen = False

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def names(self) -> list[str]:
        return sorted(self._by_name)

    def all(self) -> list[ModelVersion]:
        """By name, then version."""
        return sorted((v for vs in list(self._by_name.values()) for v in vs), key=lambda v: (v.name, v.version))

    def of(self, name: str) -> tuple[ModelVersion, ...]:
        """Newest first; empty for an unknown name."""
        return self._by_name.get(name, ())

    def get(self, name: str, version: int) -> ModelVersion | None:
        return next((v for v in self.of(name) if v.version == version), None)

    def find(self, name: str, version: int) -> ModelVersion:
        """`version` 0: the newest that is served, or the newest if none is. Raises ModelNotFound."""
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
        self.on_change(name)
        return True

    def pop(self, name: str) -> tuple[ModelVersion, ...]:
        """Removes a model. Empty once the table is frozen."""
        with self.lock:
            if self.frozen:
                return ()
            versions = self._by_name.pop(name)
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
        return [v for v in self.all() if v.model is not None]
