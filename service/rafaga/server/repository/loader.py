"""From a version's folder to a model that can be served: verified, loaded and warmed up."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from msgspec import structs

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, EngineName, Precision
from rafaga.checksums import read_verified
from rafaga.errors import BundleError, DeviceError
from rafaga.plain_model import PlainModel
from rafaga.server.config.per_model import PerModel
from rafaga.server.engines import openvino, runtimes
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace, Samples
from rafaga.server.engines.runtimes import Choice, Runtime
from rafaga.server.engines.selection import EngineFactory, Placement
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.execution.supervisor import SupervisorPolicy
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository import plain_onnx as plain
from rafaga.server.repository.comparison import Compared, Comparison
from rafaga.server.repository.golden import Golden
from rafaga.server.repository.traps import UNGUARDED, guarded
from rafaga.server.repository.trial import Passed, Trial
from rafaga.server.repository.trial_process import DirectTrials, TrialFailed, Trials
from rafaga.server.scheduling.batcher import BatchPolicy

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loader:
    """Gives models that are not started. precision: None: chosen at load. engine_factory: loads each engine. trials:
    of each model before it is loaded."""

    policy: BatchPolicy
    max_batch_size: int
    precision: PerModel[Precision | None]
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
        choice = self._choice(bundle, placement)
        max_rows = min(bundle.max_batch_size, self.max_batch_size)
        passed = self._tried(folder, bundle.name, bundle.version, placement, bundle, choice.default.file)
        runtime, guards, placement = self._fastest(choice, passed, placement, folder, bundle, max_rows)
        golden = Golden.load(bundle, io.BytesIO(read_verified(folder, bundle, bundles.GOLDEN)))
        verify = partial(golden.verify, tolerance=runtime.tolerance, max_rows=max_rows)

        def read() -> ModelToPlace:
            model = guarded(read_verified(folder, bundle, runtime.file), guards)
            precision = runtime.precision or Precision.FP32
            return ModelToPlace(bundle, model, precision, golden, max_rows, verify, runtime.engine)

        return self._served(bundle, runtime, golden, placement, read)

    def _load_plain(self, path: Path, name: str, version: int, placement: Placement) -> ServedModel:
        choice = runtimes.of_plain(placement.engine_of(name))
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
        samples, rows = recipe.samples(described.inputs), max(1, described.max_batch_size)
        runtime, guards, placement = self._fastest(choice, passed, placement, path, described, rows)

        def read() -> ModelToPlace:
            model = plain.read(path)
            if hashlib.sha256(model).hexdigest() != passed.sha256:
                raise BundleError(f"{name}: its ONNX file has changed since it was loaded")
            model = guarded(model, guards)
            return ModelToPlace(described, model, Precision.FP32, samples, rows, None, runtime.engine)

        return self._served(described, runtime, samples, placement, read)

    def _choice(self, bundle: Bundle, placement: Placement) -> Choice:
        precision = self.precision.of(bundle.name)
        if placement.gpu:
            return runtimes.on_gpu(bundle, precision)
        return runtimes.on_cpu(bundle, placement.engine_of(bundle.name), precision, openvino.installed())

    def _fastest(
        self, choice: Choice, passed: Passed, placement: Placement, path: Path, model: Bundle | PlainModel, rows: int
    ) -> tuple[Runtime, Sequence[int], Placement]:
        """And what to guard in its file, and the placement with what was measured for it. Raises BundleError where
        OpenVINO is asked for and does not run the model."""
        name, default = model.name, choice.default
        asked = default.engine is EngineName.OPENVINO
        several = placement.instances_are_free(name) and not passed.quick
        try_spinning = placement.spinning_is_free(name) and not passed.quick
        rivals = choice.rivals if asked or not (passed.quick or not openvino.usable()) else ()
        if not (rivals or several or try_spinning):
            return default, passed.guards, placement
        rivals = rivals or (default,)
        threads = placement.cpu_threads(name)
        comparison = Comparison(
            path=str(path.absolute()),
            rivals=rivals,
            threads=threads.fixed or threads.share,
            spinning=threads.spinning,
            max_rows=rows,
            bundle=model if isinstance(model, Bundle) else None,
            plain=passed.described,
            recipe=passed.recipe,
            several=several,
            try_spinning=try_spinning,
        )
        try:
            compared = self.trials.compare(comparison)
        except BundleError as error:  # an engine ended the process, or took too long
            compared = Compared(reasons=(str(error),))
        for reason in compared.reasons:
            _LOG.warning("an engine is left out: %s", reason, extra={"model": name})
        if compared.fastest is None:
            if asked:
                raise BundleError(f"{name}: {'; '.join(compared.reasons)}")
            why = f"{default.why}; the comparison failed, see the log"
            return structs.replace(default, why=why), passed.guards, placement
        facts = [default.why]
        if len(rivals) > 1:
            speeds = (f"{s:.2f}" if s else "refused, see the log" for s in compared.speeds)
            measured = (f"{rival} {speed}" for rival, speed in zip(rivals, speeds, strict=True))
            facts = ["speed here", *measured, *choice.left_out]
        runtime = structs.replace(rivals[compared.fastest], why="; ".join((*facts, *compared.tried)))
        placement = dataclasses.replace(placement, auto_instances=compared.instances, auto_spinning=compared.spinning)
        return runtime, compared.guards, placement

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
        runtime: Runtime,
        samples: Samples,
        placement: Placement,
        read: Callable[[], ModelToPlace],
    ) -> ServedModel:
        """`read` is called for every engine, also when one is restarted: no copy of the file stays in memory."""
        devices = placement.devices_of(bundle.name)
        about = {"model": bundle.name, "engine": runtime.engine.value, "precision": runtime.precision or ""}
        _LOG.info("engine chosen", extra=about | {"why": runtime.why})

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
            runtime,
            [engine for engine, _ in loaded],
            # Devices of one kind count as equally fast. The table outlives its engine: it has learned from real runs.
            loaded[0].latency,
            self.policy,
            self.metrics.model(bundle.name, runtime.engine, runtime.precision or ""),
            samples,
            lambda number: load(number).engine,
            self.supervision,
        )


def is_plain(path: Path) -> bool:
    """Whether it is an ONNX file, or a folder that holds a model without a bundle. A bundle that lost its manifest is a
    broken bundle."""
    remains = (path / bundles.MANIFEST).exists() or (path / bundles.GOLDEN).exists()
    return path.is_file() or ((path / plain.MODEL).exists() and not remains)
