"""The repository: which models are served, and the model for each request."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rafaga.bundle import Task
from rafaga.errors import InvalidRequest, ModelNotFound, ModelNotReady, listed, quoted
from rafaga.server.config.model_versions import Versions
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository import retirement
from rafaga.server.repository.discovery import Discovery
from rafaga.server.repository.loader import Loader
from rafaga.server.repository.reconciler import Reconciler
from rafaga.server.repository.retirement import Retirement
from rafaga.server.repository.versions import ModelVersion, State, VersionTable

_LOG = logging.getLogger(__name__)

# How long a load takes is unknown; asking once a second costs little.
_RETRY_AFTER_S = 1.0

STARTING = "the server is starting"

EVERY_MODEL = "*"
"""As a name in `load`: all models in the repository."""


class Repository:
    """`versions` of every model under `root`. `explicit`: only models that were asked for by name.

    Requests look models up without a lock. Changes run one at a time.
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
        """`on_state`: see VersionTable."""
        self._root = root
        self._discovery = Discovery(root)
        self._metrics = metrics
        self._wanted = versions or Versions()
        self._explicit = explicit
        self._table = VersionTable(on_state)
        self._retirement = Retirement(metrics)
        self._reconciler = Reconciler(loader, metrics, self._table, self._retirement, self._wanted)
        self._changing = threading.Lock()
        self._progress = STARTING
        self._scanned = self._loaded = False

    # What services and health ask. Every signal of readiness (grpc.health, /readyz, the Open Inference Protocol, the
    # catalogue) comes from here, so that they never disagree.

    def __contains__(self, name: str) -> bool:
        return name in self._table

    @property
    def versions(self) -> list[ModelVersion]:
        """All that are known, served or not, by name and version."""
        return self._table.all()

    @property
    def ready(self) -> bool:
        """False until everything that was there at the start is served, and while any model has lost its engine."""
        return not self.unready_because

    @property
    def unready_because(self) -> str:
        """Why the server is not ready, without paths; empty if it is."""
        if self._table.frozen:
            return "the server is stopping"
        if not self._loaded:
            return self._progress
        versions = self.versions
        if not versions and not self._explicit:
            return "no model found in the repository; see the server's log for what is expected"
        missing = [
            f"{v.name} version {v.version} is {v.condition.value}{f' ({v.why})' if v.why else ''}"
            for v in versions
            if v.condition is not State.READY and (not v.late or v.condition is State.DOWN)
        ]
        if missing:
            return listed(missing, most_characters=2000)
        if self._explicit or any(v.condition is State.READY for v in versions):
            return ""
        return "no model is served"

    @property
    def alive(self) -> bool:
        """False if the process must be restarted: a model lost its engines, and its device accepts no new one."""
        return not any(v.model is not None and v.model.unrecoverable for v in self.versions)

    def serves(self, name: str) -> bool:
        """Whether any version of this model is ready."""
        return any(v.condition is State.READY for v in self._table.of(name))

    def served_versions(self, name: str) -> list[int]:
        """In rising order."""
        return [v.version for v in reversed(self._table.of(name)) if v.model is not None]

    def version(self, name: str, version: int) -> ModelVersion:
        """`version` 0: the newest that is served, or the newest if none is.

        Raises ModelNotFound, and ModelNotReady as `require_names`.
        """
        self.require_names()
        return self._table.find(name, version)

    def require_names(self) -> None:
        """Raises ModelNotReady before the repository was read at the start: until then no name is known."""
        if not self._scanned:
            raise ModelNotReady("the server is starting: its models are not known yet", _RETRY_AFTER_S)

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

    # What changes it.

    def load(self, names: tuple[str, ...] = ()) -> None:
        """At the start: loads all models, or with explicit control those of `names`.

        A model that fails is reported and not served; the others are. Raises FileNotFoundError without a repository,
        or if a model is missing that `names` or a version rule requires.
        """
        with self._changing:
            found = self._discovery.scan()
            if names == (EVERY_MODEL,):
                names = tuple(found)
            required = set(names) if self._explicit else self._wanted.by_model.keys()
            if missing := sorted(required - found.keys()):
                raise FileNotFoundError(f"no model {', '.join(missing)} in {self._root}")
            if self._explicit:
                found = {name: found[name] for name in names}
            for name, folders in found.items():
                self._reconciler.announce(name, folders)
            self._scanned = True
            for number, (name, folders) in enumerate(found.items(), 1):
                if self._table.frozen:
                    return
                self._progress = f"loading model {name} ({number} of {len(found)})"
                _LOG.info("loading model", extra={"model": name, "number": number, "of": len(found)})
                self._reconciler.update(name, folders, late=False)
            self._loaded = True
        self._table.on_change("")

    def update(self) -> None:
        """Loads what is new or changed on disk, and unloads what is gone. Raises FileNotFoundError as `load`."""
        with self._changing:
            found = self._discovery.scan()
            for name, folders in found.items():
                self._reconciler.update(name, folders, late=True)
            for name in self._table.names:
                if name not in found:
                    models = self._reconciler.remove(name)
                    for model in models:
                        self._retirement.start(model, replaced=False, then=partial(self._forget, name))
                    if not models:
                        self._forget(name)

    def load_model(self, name: str) -> None:
        """Loads what is new or changed of one model, and retries what failed.

        Raises ModelNotFound if it is not on disk, ModelNotReady if it is refused; what was served before still is.
        """
        with self._changing:
            folders = self._discovery.scan().get(name)
            if folders is None:
                raise ModelNotFound(f"no model {quoted(name)} in the repository")
            failed = self._reconciler.update(name, folders, late=True, retry=True)
        if failed:
            raise ModelNotReady(
                f"model {name!r} version {listed(failed)} was refused at load, and nothing has changed; "
                "see the server's log for the cause"
            )

    def unload_model(self, name: str) -> None:
        """Returns once its requests are answered and its memory is free. Raises ModelNotFound."""
        with self._changing:
            self._table.find(name, 0)
            models = self._reconciler.remove(name)
        _LOG.info("model unloaded", extra={"model": name})
        for model in models:
            retirement.finish(model, replaced=False)
        self._forget(name)

    def _forget(self, name: str) -> None:
        """Removes the metrics of a model, unless it was loaded again in the meantime."""
        with self._table.lock:  # a load enters the table before it creates metrics
            if name not in self._table:
                self._metrics.model_removed(name)

    def on_disk(self) -> list[tuple[str, int]]:
        """Every version of every model in the repository, served or not."""
        return [(name, version) for name, folders in self._discovery.scan().items() for version in sorted(folders)]

    def withdraw(self) -> None:
        """From now on nothing is reported as ready, and nothing is loaded any more. Requests are still served."""
        for entry in self._table.freeze():
            self._metrics.model_ready(entry.name, entry.version, False)
            self._table.on_change(entry.name)
        self._table.on_change("")

    def drain(self) -> None:
        """Every model refuses new requests and answers the queued ones."""
        for entry in self._table.freeze():
            if entry.model is not None:
                entry.model.drain()

    def close(self) -> None:
        for entry in self._table.freeze():
            if entry.model is not None:
                entry.model.close()
        self._retirement.close()
