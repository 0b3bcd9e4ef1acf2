"""The models on disk and the models in service: scan, verify, load, warm up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Precision, Task, Variant
from rafaga.errors import BundleError, InvalidRequest, ModelNotFound, ModelNotReady
from rafaga.server import plain
from rafaga.server.batcher import BatchPolicy
from rafaga.server.engine import Engine, Golden, create_session
from rafaga.server.metrics import Metrics
from rafaga.server.model import ServedModel
from rafaga.server.onnx_file import refuse_external_data
from rafaga.server.plain import PlainModel

_LOG = logging.getLogger(__name__)


class State(Enum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"


@dataclass
class Slot:
    """One version of one model, in whatever state. `bundle` is None when its manifest could not be read."""

    name: str
    version: int
    folder: Path
    state: State = State.LOADING
    reason: str = ""
    bundle: Bundle | PlainModel | None = None
    model: ServedModel | None = None


@dataclass(frozen=True)
class Loader:
    """Turns a bundle's folder into a ServedModel, or raises BundleError. `threads` None: chosen per model."""

    policy: BatchPolicy
    max_batch_size: int
    precision: Precision
    threads: int | None
    metrics: Metrics

    def load(self, folder: Path, bundle: Bundle) -> ServedModel:
        bundles.verify_files(folder, bundle)
        variant = self._choose(bundle)
        golden = Golden.load(bundle, folder / bundles.GOLDEN)
        model = (folder / variant.file).read_bytes()
        refuse_external_data(model)
        engine = Engine.load(bundle, model, golden, self.threads)
        golden.check(engine.run(golden.inputs), variant.golden_tolerance)
        max_batch_size = min(bundle.max_batch_size, self.max_batch_size)
        latency = engine.warm_up(golden, max_batch_size)
        return ServedModel(bundle, variant, engine, latency, self.policy, self.metrics.model(bundle.name), golden)

    def load_plain(self, folder: Path) -> ServedModel:
        """A model.onnx without a bundle: nothing is verified but that it runs."""
        name, version = folder.parent.name, int(folder.name)
        model = (folder / plain.MODEL).read_bytes()
        refuse_external_data(model)
        try:
            session = create_session(model, 1)
        except Exception as error:  # onnxruntime raises bare exceptions of many kinds
            raise BundleError(f"{name}: ONNX Runtime does not run the model: {error}") from None
        described, samples = plain.describe(name, version, session, self.max_batch_size)
        engine = Engine.load(described, model, samples, self.threads)
        latency = engine.warm_up(samples, max(1, described.max_batch_size))
        return ServedModel(described, None, engine, latency, self.policy, self.metrics.model(name), samples)

    def _choose(self, bundle: Bundle) -> Variant:
        variant = bundle.variant(self.precision)
        if variant is None:
            there = ", ".join(v.precision for v in bundle.variants)
            raise BundleError(f"{bundle.name} has no {self.precision} variant, only {there}")
        return variant


class Repository:
    """Serves the newest version of every model under `root`. Loaded once, at start."""

    def __init__(
        self, root: Path, loader: Loader, metrics: Metrics, on_state: Callable[[str, bool], None] = lambda *_: None
    ) -> None:
        self._root = root
        self._loader = loader
        self._metrics = metrics
        self._on_state = on_state  # (model, ready)
        self._slots: dict[str, Slot] = {}

    @property
    def slots(self) -> list[Slot]:
        return sorted(self._slots.values(), key=lambda s: s.name)

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    @property
    def ready(self) -> bool:
        """Every model that is there is served: one that failed keeps the whole server from being ready."""
        return bool(self._slots) and all(s.state is State.READY for s in self._slots.values())

    def load(self) -> None:
        """Loads all. A model that fails is reported and not served; the others are. Raises FileNotFoundError."""
        for name, version, folder in _newest(self._root):
            self._slots[name] = slot = Slot(name, version, folder)
            self._on_state(name, False)
            self._load(slot)

    def model(self, name: str, version: int, task: Task | None = None) -> ServedModel:
        """The served model for a request. `version` 0: the newest.

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
        """Raises ModelNotFound."""
        slot = self._slots.get(name)
        if slot is None:
            there = ", ".join(sorted(self._slots)) or "none"
            raise ModelNotFound(f"no model {name[:63]!r}; there are: {there}")
        if version not in (0, slot.version):
            raise ModelNotFound(f"model {name!r} has no version {version}; version {slot.version} is served")
        return slot

    def drain(self) -> None:
        for slot in self._slots.values():
            if slot.model is not None:
                slot.state = State.DRAINING
                self._on_state(slot.name, False)
                self._metrics.model_ready(slot.name, slot.version, False)
                slot.model.drain()

    def close(self) -> None:
        for slot in self._slots.values():
            if slot.model is not None:
                slot.model.close()

    def _load(self, slot: Slot) -> None:
        start = time.perf_counter()
        about: dict[str, object] = {"model": slot.name, "version": slot.version}
        try:
            if _is_plain(slot.folder):
                slot.model = self._loader.load_plain(slot.folder)
                slot.bundle = slot.model.bundle
            else:
                slot.bundle = bundle = bundles.load(slot.folder)
                slot.model = self._loader.load(slot.folder, bundle)
        except Exception as error:  # onnxruntime raises bare exceptions of many kinds
            slot.state, slot.reason = State.FAILED, "the model was refused at load; the server's log has the cause"
            self._metrics.model_ready(slot.name, slot.version, False)
            _LOG.error("model not served: %s", error, extra=about, exc_info=not isinstance(error, BundleError))
            return
        slot.model.start()
        slot.state = State.READY
        seconds = time.perf_counter() - start
        self._metrics.model_loaded(slot.name, slot.version, seconds)
        self._metrics.model_ready(slot.name, slot.version, True)
        self._on_state(slot.name, True)
        weights = slot.bundle.weights
        about |= {"trained": weights.trained, "seconds": round(seconds, 3)}
        if slot.model.variant is None:
            _LOG.warning("model ready, UNVERIFIED: a plain ONNX file, so nothing is known of its answers", extra=about)
            return
        about["precision"] = slot.model.variant.precision
        if weights.trained:
            _LOG.info("model ready", extra=about)
        else:
            _LOG.warning("model ready with RANDOM weights: its answers mean nothing", extra=about)


def _is_plain(folder: Path) -> bool:
    """A model without a bundle, and no remains of one: a bundle that lost its manifest is a broken bundle."""
    model = folder / plain.MODEL
    remains = (folder / bundles.MANIFEST).exists() or (folder / bundles.GOLDEN).exists()
    return model.is_file() and not model.is_symlink() and not remains


def _newest(root: Path) -> list[tuple[str, int, Path]]:
    """(name, version, folder) of the newest version of each model. Raises FileNotFoundError."""
    if not root.is_dir():
        raise FileNotFoundError(f"no model repository at {root}: `python -m export --output {root} NAME` makes one")
    found: list[tuple[str, int, Path]] = []
    for parent in sorted(root.iterdir()):
        if not parent.is_dir() or not bundles.NAME_PATTERN.fullmatch(parent.name):
            continue
        versions = [int(p.name) for p in parent.iterdir() if p.is_dir() and p.name.isdecimal() and p.name[0] != "0"]
        if versions:
            found.append((parent.name, max(versions), parent / str(max(versions))))
    return found
