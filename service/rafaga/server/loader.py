"""From a version's folder to a model that can be served: verified, loaded, warmed up, and right."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Precision, Variant
from rafaga.errors import BundleError
from rafaga.server import plain
from rafaga.server.batcher import BatchPolicy
from rafaga.server.engine import Engine, Golden, Samples, create_session
from rafaga.server.latency import LatencyTable
from rafaga.server.metrics import Metrics
from rafaga.server.model import ServedModel
from rafaga.server.onnx_file import refuse_external_data
from rafaga.server.plain import PlainModel
from rafaga.server.watch import WatchPolicy

_LOG = logging.getLogger(__name__)

# Less is not worth giving up the answers of full precision for.
_WORTHWHILE_SPEEDUP = 1.2


@dataclass(frozen=True)
class Loader:
    """Gives models that are not started. `threads` and `precision` None: chosen per model."""

    policy: BatchPolicy
    max_batch_size: int
    precision: Precision | None
    threads: int | None
    metrics: Metrics
    watch: WatchPolicy = field(default_factory=WatchPolicy)

    def load(self, folder: Path, bundle: Bundle) -> ServedModel:
        """Raises BundleError when a file is not what was published, or the answers are not PyTorch's."""
        variant = self._choose(bundle)
        bundles.verify_files(folder, bundle, but=variant.file)
        golden = Golden.load(bundle, folder / bundles.GOLDEN)
        max_batch_size = min(bundle.max_batch_size, self.max_batch_size)

        def start() -> tuple[Engine, LatencyTable]:
            model = bundles.read_verified(folder, bundle, variant.file)
            refuse_external_data(model)
            engine = Engine.load(bundle, model, golden, self.threads)
            golden.check(engine.run(golden.inputs), variant.golden_tolerance)
            return engine, engine.warm_up(golden, max_batch_size)

        return self._served(bundle, variant, golden, start)

    def load_plain(self, folder: Path) -> ServedModel:
        """A model.onnx without a bundle: nothing is verified but that it runs. Raises BundleError when it does not."""
        name, version = folder.parent.name, int(folder.name)
        model = (folder / plain.MODEL).read_bytes()
        digest = hashlib.sha256(model).digest()
        refuse_external_data(model)
        try:
            session = create_session(model, 1)
        except Exception as error:  # onnxruntime raises bare exceptions of many kinds
            raise BundleError(f"{name}: ONNX Runtime does not run the model: {error}") from None
        described, samples = plain.describe(name, version, session, self.max_batch_size)

        def start() -> tuple[Engine, LatencyTable]:
            model = (folder / plain.MODEL).read_bytes()
            if hashlib.sha256(model).digest() != digest:
                raise BundleError(f"{name}: the file is not the one that was loaded")
            engine = Engine.load(described, model, samples, self.threads)
            return engine, engine.warm_up(samples, max(1, described.max_batch_size))

        del model, session
        return self._served(described, None, samples, start)

    def _served(
        self,
        bundle: Bundle | PlainModel,
        variant: Variant | None,
        samples: Samples,
        start: Callable[[], tuple[Engine, LatencyTable]],
    ) -> ServedModel:
        """`start` gives an engine that is right and warm, now and whenever it must be replaced."""
        engine, latency = start()
        metrics = self.metrics.model(bundle.name)
        # What the table learned from real runs outlives the engine it was measured on.
        return ServedModel(
            bundle, variant, engine, latency, self.policy, metrics, samples, lambda: start()[0], self.watch
        )

    def _choose(self, bundle: Bundle) -> Variant:
        if self.precision is None:
            variant, why = fastest_eligible(bundle)
            _LOG.info("variant chosen", extra={"model": bundle.name, "precision": variant.precision.value, "why": why})
            return variant
        wanted = bundle.variant(self.precision)
        if wanted is None:
            there = ", ".join(v.precision for v in bundle.variants)
            raise BundleError(f"{bundle.name} has no {self.precision} variant, only {there}")
        return wanted


def fastest_eligible(bundle: Bundle) -> tuple[Variant, str]:
    """The variant to serve on a CPU when nobody says which, and why.

    A variant other than fp32 must have kept its accuracy, as measured by export, and be clearly faster.
    """
    full = bundle.variant(Precision.FP32) or bundle.variants[0]
    faster = [v for v in bundle.variants if v is not full and v.cpu_speedup >= _WORTHWHILE_SPEEDUP]
    if not faster:
        return full, "no other variant is clearly faster"
    eligible = [v for v in faster if v.default_eligible]
    best = max(eligible or faster, key=lambda v: v.cpu_speedup)
    facts = f"{best.cpu_speedup:.1f} times as fast as {full.precision} at export, {lost(best)}"
    return (best, facts) if eligible else (full, f"{best.precision} is {facts}")


def lost(variant: Variant) -> str:
    """What export measured of its accuracy, in words."""
    if variant.loss is None:
        return "kept its accuracy" if variant.default_eligible else "loses nobody knows how much accuracy"
    loss = variant.loss
    return f"loses {100 * loss.drop:.2f} points of {loss.metric} where {100 * loss.allowed_drop:g} are allowed"


def is_plain(folder: Path) -> bool:
    """A model without a bundle, and no remains of one: a bundle that lost its manifest is a broken bundle."""
    model = folder / plain.MODEL
    remains = (folder / bundles.MANIFEST).exists() or (folder / bundles.GOLDEN).exists()
    return model.is_file() and not model.is_symlink() and not remains
