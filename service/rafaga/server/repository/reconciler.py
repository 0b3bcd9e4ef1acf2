"""Brings the versions of one model that are served to the state on disk.

    load → warm up → verify → swap → drain the old

A served model is only replaced by a verified one. A failed load changes the reported state, not the service. A model
that was replaced or unloaded answers what it has accepted, then frees its memory.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from rafaga import bundle as bundles
from rafaga.errors import BundleError
from rafaga.server.config.model_versions import Versions
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository.discovery import stamp
from rafaga.server.repository.loader import Loader, is_plain
from rafaga.server.repository.trial_process import TrialFailed
from rafaga.server.repository.versions import ModelVersion, State, VersionTable

_LOG = logging.getLogger(__name__)

LINGER_S = 2.0
"""How long a replaced version accepts requests that found it earlier and are still decoding their images."""

_DRAIN_S = 60.0


class Reconciler:
    """Not thread-safe: the repository runs one change at a time. Models change their state from their own threads."""

    def __init__(self, loader: Loader, metrics: Metrics, table: VersionTable, wanted: Versions) -> None:
        self._loader = loader
        self._metrics = metrics
        self._table = table
        self._retiring: set[ServedModel] = set()
        self._wanted = wanted

    def announce(self, name: str, folders: Mapping[int, Path]) -> None:
        """At the start: shows the versions that `update` will load as being loaded."""
        for version in self._wanted.of(name).wanted(folders):
            if version in folders:
                self._table.put(ModelVersion(name, version, late=False))

    def update(self, name: str, folders: Mapping[int, Path], *, late: bool, retry: bool = False) -> list[int]:
        """Brings one model to the state on disk; returns the refused versions.

        late: see `ModelVersion`. retry: also loads the versions again that were refused before.
        """
        wanted = self._wanted.of(name).wanted(folders)
        for version in wanted:
            entry = ModelVersion(name, version, late)
            if version in folders:
                self._update_version(entry, folders[version], retry)
            else:
                self._missing(entry)
        entries = self._table.of(name)
        # Remove the others only once one of the wanted versions is served.
        if any(entry.model is not None for entry in entries if entry.version in wanted):
            for entry in entries:
                if entry.version not in wanted:
                    self._table.discard(name, entry.version)
                    self._metrics.model_gone(name, entry.version)
                    if entry.model is not None:
                        self.retire(entry.model, replaced=True)
        return [entry.version for entry in self._table.of(name) if entry.version in wanted and entry.reason]

    def _update_version(self, entry: ModelVersion, folder: Path, retry: bool) -> None:
        before = self._table.get(entry.name, entry.version)
        if before is not None and before.state is State.LOADING:  # only announced
            before = None
        try:
            now = stamp(folder)
        except OSError as error:
            # No permission, or removed during the scan. What was loaded from it before is still served.
            if before is None:
                self._refuse(entry, "its folder cannot be read; see the server's log for the cause", error)
            elif before.model is not None:
                _LOG.error("a version's folder cannot be read, it is served as before: %s", error, extra=entry.about)
            return
        if before is None or before.stamp != now or (retry and before.reason):
            self._load(dataclasses.replace(entry, stamp=now), folder, before)

    def _missing(self, entry: ModelVersion) -> None:
        """A version that a rule names is not on disk."""
        before = self._table.get(entry.name, entry.version)
        if before is not None and before.model is None and not before.stamp:
            return  # reported already
        reason = "a version rule names it, but it is not in the repository"
        self._refuse(entry, reason, reason)
        if before is not None and before.model is not None:
            self.retire(before.model, replaced=False)

    def _load(self, entry: ModelVersion, folder: Path, before: ModelVersion | None) -> None:
        """Puts a new or changed version into service. If that fails, `before` stays."""
        start = time.perf_counter()
        old = None if before is None else before.model
        if old is None and not self._table.put(entry):
            return  # the server stops
        try:
            if is_plain(folder):
                model = self._loader.load_plain(folder, entry.name, entry.version)
                entry = dataclasses.replace(entry, bundle=model.bundle)
            else:
                bundle = bundles.load(folder, (entry.name, entry.version))
                entry = dataclasses.replace(entry, bundle=bundle)
                model = self._loader.load(folder, bundle)
        except Exception as error:  # onnxruntime raises bare exceptions of many kinds
            cause = str(error) if isinstance(error, TrialFailed) else "see the server's log for the cause"
            if self._table.frozen:
                pass  # the server stops
            elif before is None or old is None:
                self._refuse(entry, f"the model was refused at load; {cause}", error)
            else:
                before = dataclasses.replace(before, stamp=entry.stamp)
                reason = f"its files changed and were refused at load; the version loaded before is served; {cause}"
                self._refuse(before, reason, error)
            return
        model.start(partial(self._engine_changed, entry, model))
        if not self._table.put(dataclasses.replace(entry, state=State.READY, model=model)):
            model.close()  # the server stops
            return
        seconds = time.perf_counter() - start
        self._metrics.model_loaded(entry.name, entry.version, seconds, model.metrics)
        _log_ready(entry, model, seconds)
        if old is not None:
            self.retire(old, replaced=True)

    def retire(self, model: ServedModel, *, replaced: bool, then: Callable[[], None] = lambda: None) -> None:
        """Finishes a model in a thread of its own, and then calls `then`."""

        def run() -> None:
            start = time.perf_counter()
            time.sleep(LINGER_S)
            finish(model, replaced=replaced)
            self._retiring.discard(model)
            if replaced:
                self._metrics.model_swapped(model.bundle.name, time.perf_counter() - start)
            then()

        self._retiring.add(model)
        threading.Thread(target=run, name=f"retire-{model.bundle.name}", daemon=True).start()

    def close(self) -> None:
        """Closes the models that are not finished."""
        for model in list(self._retiring):
            model.close()

    def _refuse(self, entry: ModelVersion, reason: str, cause: str | Exception) -> None:
        """Reports a version that cannot be loaded. Clients see `reason`; `cause` is for the log."""
        still_served = entry.model is not None
        state = entry.state if still_served else State.FAILED
        # Before the metric, so that the reason is there when the count changes.
        self._table.put(dataclasses.replace(entry, state=state, reason=reason))
        self._metrics.model_refused(entry.name, entry.version, still_served=still_served)
        unexpected = not isinstance(cause, str | OSError | BundleError)
        _LOG.error("model not served: %s", cause, extra=entry.about, exc_info=unexpected)

    def _engine_changed(self, loaded: ModelVersion, model: ServedModel) -> None:
        """The model lost its engine, or has a new one."""
        with self._table.lock:
            entry = self._table.get(loaded.name, loaded.version)
            if entry is None or entry.model is not model:
                return  # replaced or unloaded
            self._metrics.model_ready(entry.name, entry.version, entry.condition is State.READY)
        self._table.on_change(entry.name)

    def remove(self, name: str) -> list[ServedModel]:
        """Takes a model out of service; the caller must finish the returned models."""
        entries = self._table.pop(name)
        for entry in entries:
            self._metrics.model_gone(name, entry.version)
        return [entry.model for entry in entries if entry.model is not None]


def _log_ready(entry: ModelVersion, model: ServedModel, seconds: float) -> None:
    trained = model.bundle.weights.trained
    about = {**entry.about, "seconds": round(seconds, 3), "trained": trained, "engine": model.runtime.engine.value}
    if model.runtime.precision is None:
        _LOG.warning("model ready, UNVERIFIED: a plain ONNX file has no golden answers to check", extra=about)
        return
    about["precision"] = model.runtime.precision
    if trained:
        _LOG.info("model ready", extra=about)
    else:
        _LOG.warning("model ready with RANDOM weights: its answers mean nothing", extra=about)


def finish(model: ServedModel, *, replaced: bool) -> None:
    """Answers the queued requests, for at most a minute, then closes the model."""
    model.retire(replaced=replaced)
    end = time.monotonic() + _DRAIN_S
    while not model.idle and time.monotonic() < end:
        time.sleep(0.005)
    model.close()
