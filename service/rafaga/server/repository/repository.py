"""The repository: loads, replaces and unloads the models on disk; at the start, on request, or by polling."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rafaga.errors import Draining, ModelNotFound, ModelNotReady, listed, quoted
from rafaga.server.config.model_versions import VersionPolicy, Versions
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository.discovery import Discovery
from rafaga.server.repository.loader import Loader
from rafaga.server.repository.reconciler import Reconciler, finish
from rafaga.server.repository.versions import VersionTable

_LOG = logging.getLogger(__name__)

EVERY_MODEL = "*"
"""As a name in `load`: all models in the repository."""


class Repository(VersionTable):
    """`versions` of every model under `root`. Changes run one at a time."""

    def __init__(
        self,
        root: Path,
        loader: Loader,
        metrics: Metrics,
        on_change: Callable[[str], None] = lambda _: None,
        versions: Versions | None = None,
        explicit: bool = False,
    ) -> None:
        """`on_change`, `explicit`: see VersionTable."""
        super().__init__(on_change, explicit)
        self._root = root
        self._discovery = Discovery(root)
        self._metrics = metrics
        self._wanted = versions or Versions(VersionPolicy())
        self._reconciler = Reconciler(loader, metrics, self, self._wanted)
        self._trials = loader.trials
        self._changing = threading.Lock()

    def load(self, names: tuple[str, ...] = ()) -> None:
        """At the start: loads all models, or with explicit control those of `names`.

        A model that fails is reported and not served; the others are. Raises FileNotFoundError without a repository,
        or if a model is missing that `names` or a version rule requires.
        """
        with self._change():
            found = self._discovery.scan()
            if names == (EVERY_MODEL,):
                names = tuple(found)
            required = set(names) if self.explicit else self._wanted.by_model.keys()
            if missing := sorted(required - found.keys()):
                raise FileNotFoundError(f"no model {', '.join(missing)} in {self._root}")
            if self.explicit:
                found = {name: found[name] for name in names}
            for name, folders in found.items():
                self._reconciler.announce(name, folders)
            self.scanned = True
            for number, (name, folders) in enumerate(found.items(), 1):
                if self.frozen:
                    return
                _LOG.info("loading model", extra={"model": name, "number": number, "of": len(found)})
                self.progress = f"loading model {name} ({number} of {len(found)})"
                self._reconciler.update(name, folders, late=False)
            self.loaded = True
        self.on_change("")

    def update(self) -> None:
        """Loads what is new or changed on disk, and unloads what is gone. Raises FileNotFoundError as `load`."""
        with self._change():
            found = self._discovery.scan()
            for name, folders in found.items():
                self._reconciler.update(name, folders, late=True)
            for name in self.names:
                if name not in found:
                    models = self._reconciler.remove(name)
                    for model in models:
                        self._reconciler.retire(model, replaced=False, then=partial(self._forget, name))
                    if not models:
                        self._forget(name)

    def load_model(self, name: str) -> None:
        """Loads what is new or changed of one model, and retries what failed.

        Raises ModelNotFound if it is not on disk, ModelNotReady if it is refused, Draining if the server stops. What
        was served before still is.
        """
        with self._change():
            folders = self._discovery.scan().get(name)
            if folders is None:
                raise ModelNotFound(f"no model {quoted(name)} in the repository")
            failed = self._reconciler.update(name, folders, late=True, retry=True)
        if self.frozen:
            raise Draining("the server is stopping: ask another replica")
        if failed:
            raise ModelNotReady(
                f"model {name!r} version {listed(failed)} was refused at load, and nothing has changed; "
                "see the server's log for the cause"
            )

    def unload_model(self, name: str) -> None:
        """Returns once its requests are answered and its memory is free. Raises ModelNotFound."""
        with self._changing:
            self.version(name, 0)
            models = self._reconciler.remove(name)
        _LOG.info("model unloaded", extra={"model": name})
        for model in models:
            finish(model, replaced=False)
        self._forget(name)

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Afterwards the process that tried the models takes no memory."""
        with self._changing:
            try:
                yield
            finally:
                self._trials.close()

    def _forget(self, name: str) -> None:
        """Removes the metrics of a model, unless it was loaded again in the meantime."""
        with self.lock:  # a load enters the table before it creates metrics
            if name not in self:
                self._metrics.model_removed(name)

    def on_disk(self) -> list[tuple[str, int]]:
        """Every version of every model in the repository, served or not."""
        return [(name, version) for name, folders in self._discovery.scan().items() for version in sorted(folders)]

    def withdraw(self) -> None:
        """From now on nothing is reported as ready, and nothing is loaded any more. Requests are still served."""
        for entry in self.freeze():
            self._metrics.model_ready(entry.name, entry.version, False)
            self.on_change(entry.name)
        self.on_change("")
        self._trials.close()

    def drain(self) -> None:
        """Every model refuses new requests and answers the queued ones."""
        for entry in self.freeze():
            if entry.model is not None:
                entry.model.drain()

    def close(self) -> None:
        entries = self.freeze()
        self._trials.close()
        for entry in entries:
            if entry.model is not None:
                entry.model.close()
        self._reconciler.close()


class Poller:
    """Updates the repository every `interval_s`, in a thread of its own."""

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
            except Exception:  # for example a volume that is not mounted for a moment: keep serving
                _LOG.exception("the repository could not be read; the loaded models are still served")
