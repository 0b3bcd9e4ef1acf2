"""From a version's folder to a model that can be served: verified, loaded and warmed up."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rafaga import bundle as bundles
from rafaga import int8
from rafaga.bundle import Bundle, Precision, Variant
from rafaga.errors import BundleError, DeviceError
from rafaga.plain_model import PlainModel
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace, Samples
from rafaga.server.engines.selection import EngineFactory, Placement
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.execution.supervisor import SupervisorPolicy
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository import plain_onnx as plain
from rafaga.server.repository.golden import Golden
from rafaga.server.repository.traps import UNGUARDED, guarded
from rafaga.server.repository.trial import Passed, Trial
from rafaga.server.repository.trial_process import DirectTrials, TrialFailed, Trials
from rafaga.server.scheduling.batcher import BatchPolicy

_LOG = logging.getLogger(__name__)

# A smaller speedup is not worth giving up the answers of full precision.
_WORTHWHILE_SPEEDUP = 1.2


@dataclass(frozen=True)
class Loader:
    """Gives models that are not started. precision: None: chosen per model. engine_factory: loads each engine. trials:
    of each model before it is loaded."""

    policy: BatchPolicy
    max_batch_size: int
    precision: Precision | None
    placement: Placement
    metrics: Metrics
    supervision: SupervisorPolicy = field(default_factory=SupervisorPolicy)
    engine_factory: EngineFactory = Placement.load
    trials: Trials = field(default_factory=DirectTrials)

    def load(self, folder: Path, bundle: Bundle) -> ServedModel:
        """Raises BundleError when a file is not what was published or the answers are not PyTorch's, and DeviceError
        when the device does not take the model and no fallback is allowed."""
        return self._placed(bundle.name, partial(self._load, folder, bundle))

    def load_plain(self, path: Path, name: str, version: int) -> ServedModel:
        """An ONNX file, or a folder with model.onnx, without a bundle: only verified to run. Raises BundleError when it
        does not."""
        return self._placed(name, partial(self._load_plain, path, name, version))

    def _placed(self, name: str, load: Callable[[Placement], ServedModel]) -> ServedModel:
        try:
            return load(self.placement)
        except DeviceError as error:
            if not self.placement.may_fall_back:
                raise
            _LOG.warning("FALLEN BACK to the CPU, as device_fallback allows: %s", error, extra={"model": name})
            return load(self.placement.on_cpu())

    def _load(self, folder: Path, bundle: Bundle, placement: Placement) -> ServedModel:
        variant = self._choose(bundle, placement.gpu)
        max_rows = min(bundle.max_batch_size, self.max_batch_size)
        passed = self._tried(folder, bundle.name, bundle.version, placement, bundle, variant.file)
        golden = Golden.load(bundle, io.BytesIO(bundles.read_verified(folder, bundle, bundles.GOLDEN)))
        verify = partial(golden.verify, tolerance=variant.golden_tolerance, max_rows=max_rows)

        def read() -> ModelToPlace:
            model = guarded(bundles.read_verified(folder, bundle, variant.file), passed.guards)
            return ModelToPlace(bundle, model, variant.precision, golden, max_rows, verify)

        return self._served(bundle, variant, golden, placement, read)

    def _load_plain(self, path: Path, name: str, version: int, placement: Placement) -> ServedModel:
        passed = self._tried(path, name, version, placement)
        described, recipe = passed.described, passed.recipe
        assert described is not None
        assert recipe is not None
        if not recipe.valid:
            _LOG.warning(
                "served without a warm-up and one request at a time: the graph fails on every input that was tried. "
                "Write the shapes of a valid input into %s",
                plain.SHAPES,
                extra={"model": name, "version": version},
            )
        samples = recipe.samples(described.inputs)

        def read() -> ModelToPlace:
            model = plain.read(path)
            if hashlib.sha256(model).hexdigest() != passed.sha256:
                raise BundleError(f"{name}: its ONNX file has changed since it was loaded")
            rows = max(1, described.max_batch_size)
            return ModelToPlace(described, guarded(model, passed.guards), Precision.FP32, samples, rows, verify=None)

        return self._served(described, None, samples, placement, read)

    def _tried(
        self, path: Path, name: str, version: int, placement: Placement, bundle: Bundle | None = None, file: str = ""
    ) -> Passed:
        """On the CPU, also if it is for a GPU: then without large batches. Raises BundleError."""
        trial = Trial(
            path=str(path.absolute()),
            name=name,
            version=version,
            max_batch_size=self.max_batch_size,
            largest_batch=not placement.gpu,
            bundle=bundle,
            file=file,
        )
        try:
            passed = self.trials.attempt(trial)
        except TrialFailed as error:
            if bundle is not None:
                raise
            hint = f"if only some sizes do that, write the shapes of a valid input into {plain.SHAPES}"
            raise TrialFailed(f"{error}; {hint}") from None
        if any(passed.guards):
            guards = sum(kind != UNGUARDED for kind in passed.guards)
            _LOG.info("%d integer divisions of the graph are guarded against overflow", guards, extra={"model": name})
        return passed

    def _served(
        self,
        bundle: Bundle | PlainModel,
        variant: Variant | None,
        samples: Samples,
        placement: Placement,
        read: Callable[[], ModelToPlace],
    ) -> ServedModel:
        """`read` is called for every engine, also when one is restarted: no copy of the file stays in memory."""
        devices = placement.devices_of(bundle.name)

        def load(number: int) -> LoadedEngine:
            return self.engine_factory(placement, devices[number], read())

        loaded: list[LoadedEngine] = []
        try:
            for number in range(len(devices)):
                loaded += [load(number)]
        except BaseException:
            for engine, _ in loaded:
                engine.close()
            raise

        return ServedModel(
            bundle,
            variant,
            [engine for engine, _ in loaded],
            # Devices of one kind count as equally fast. The table outlives its engine: it has learned from real runs.
            loaded[0].latency,
            self.policy,
            self.metrics.model(bundle.name),
            samples,
            lambda number: load(number).engine,
            self.supervision,
        )

    def _choose(self, bundle: Bundle, gpu: bool) -> Variant:
        if self.precision is None:
            variant, why = fastest_on_gpu(bundle) if gpu else fastest_eligible(bundle, int8.quick())
            _LOG.info("variant chosen", extra={"model": bundle.name, "precision": variant.precision.value, "why": why})
            return variant
        wanted = bundle.variant(self.precision)
        if wanted is None:
            there = ", ".join(v.precision for v in bundle.variants)
            raise BundleError(f"{bundle.name} has no {self.precision} variant, only {there}")
        return wanted


def fastest_eligible(bundle: Bundle, quick_int8: bool) -> tuple[Variant, str]:
    """The variant to serve on a CPU when the configuration names none, and why. `quick_int8`: see `rafaga.int8.quick`.

    A variant other than fp32 must have kept its accuracy, as measured by export, and be clearly faster. The speed of
    int8 on a processor with VNNI says nothing about one without.
    """
    full = bundle.variant(Precision.FP32) or bundle.variants[0]
    faster = [v for v in bundle.variants if v is not full and v.cpu_speedup >= _WORTHWHILE_SPEEDUP]
    unknown = [v for v in faster if v.precision is Precision.INT8 and v.cpu_quick_int8 and not quick_int8]
    faster = [v for v in faster if v not in unknown]
    if not faster:
        if unknown:
            return full, "int8 was measured to be faster on a processor with VNNI, which this one lacks"
        if quick_int8 and any(v.cpu_quick_int8 is False for v in bundle.variants if v.precision is Precision.INT8):
            return full, "int8 was no faster on a processor without VNNI: export again on one like this to know more"
        return full, "no other variant is clearly faster"
    eligible = [v for v in faster if v.default_eligible]
    best = max(eligible or faster, key=lambda v: v.cpu_speedup)
    facts = f"{best.cpu_speedup:.1f} times as fast as {full.precision} at export, {accuracy_drop(best)}"
    return (best, facts) if eligible else (full, f"{best.precision} is {facts}")


def accuracy_drop(variant: Variant) -> str:
    """What export measured, in words."""
    if variant.loss is None:
        return "kept its accuracy" if variant.default_eligible else "accuracy loss unknown"
    loss = variant.loss
    facts = f"loses {100 * loss.drop:.2f} points of {loss.metric} where {100 * loss.allowed_drop:g} are allowed"
    few = loss.within and not variant.default_eligible
    return f"{facts}, but measured on too few samples ({loss.samples})" if few else facts


def fastest_on_gpu(bundle: Bundle) -> tuple[Variant, str]:
    """The variant to serve on a GPU when the configuration names none, and why: fp16 if it kept its accuracy, because
    tensor cores multiply it fastest. The int8 files are made for CPUs."""
    full = bundle.variant(Precision.FP32) or bundle.variants[0]
    half = bundle.variant(Precision.FP16)
    if half is None:
        return full, "there is no fp16 variant"
    return (half if half.default_eligible else full), f"on a GPU, where fp16 {accuracy_drop(half)}"


def is_plain(path: Path) -> bool:
    """Whether it is an ONNX file, or a folder that holds a model without a bundle. A bundle that lost its manifest is a
    broken bundle."""
    remains = (path / bundles.MANIFEST).exists() or (path / bundles.GOLDEN).exists()
    return path.is_file() or ((path / plain.MODEL).exists() and not remains)
