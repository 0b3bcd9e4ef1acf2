"""Where a model's engines run: on the CPU, or on GPUs, tuned there by measuring what helps.

reserve memory → session → golden answers → buckets warmed → NHWC and CUDA graphs where they win → golden again
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import onnxruntime as ort

from rafaga.bundle import Precision
from rafaga.errors import BundleError, DeviceError, DeviceMemoryError
from rafaga.server.config.device import CPU, Device, DeviceFallback, DeviceKind
from rafaga.server.config.per_model import EngineOptions, PerModel
from rafaga.server.config.settings import GpuChoice
from rafaga.server.engines.cpu_count import available_cores
from rafaga.server.engines.cuda import Cuda
from rafaga.server.engines.device_memory import CudaMemory, HostMemory, Memory
from rafaga.server.engines.devices import Choice, Gpu, Nvidia
from rafaga.server.engines.memory_budget import HEADROOM, MIB, MemoryBudget, estimate
from rafaga.server.engines.onnxruntime import Described, Engine, Samples
from rafaga.server.engines.pipelined import SLOTS, BoundEngine, PaddedEngine, fits
from rafaga.server.engines.providers import (
    CudaSettings,
    TensorRtSettings,
    building,
    cache_folder,
    create_gpu_session,
    device_failed,
    incomplete_profile,
    profile_shapes,
    raise_if_out_of_memory,
    tensorrt_versions,
    told,
)
from rafaga.server.engines.shared_lock import Gate
from rafaga.server.scheduling.latency import buckets_up_to

_LOG = logging.getLogger(__name__)

# On the CPU, handing a batch to another thread and back took 0.2 ms: too much for a small model, nothing for this one.
_BOUND_S = 10e-3
# Threads spin where the transport, the decoders and what else runs have so many cores beside a model's engines.
_LEFT_OVER_CORES = 4
# A layout must be this much faster to be worth leaving the one that everything was tested with.
_NHWC_WORTHWHILE = 0.98
# Characters of ONNX Runtime's messages that are logged.
_SAID = 300

GpuEngine = BoundEngine | PaddedEngine
# Raises BundleError when an engine's answers are wrong.
Proof = Callable[[Engine], None]


@dataclass(frozen=True)
class GpuSettings:
    """`memory_bytes`: of each GPU, for all models; None: what is free. `model_memory`: bytes for one;
    None: any."""

    buckets: tuple[int, ...] = ()
    memory_bytes: int | None = None
    model_memory: PerModel[int | None] = field(default_factory=lambda: PerModel(None))
    nhwc: GpuChoice = GpuChoice.AUTO
    graphs: GpuChoice = GpuChoice.AUTO
    tensorrt_cache: Path = Path("~/.cache/rafaga/tensorrt")


@dataclass(frozen=True)
class Task:
    """A model to be placed. `proof` None: nothing is known of its answers."""

    model: Described
    content: bytes
    precision: Precision
    samples: Samples
    max_rows: int
    proof: Proof | None


class Site:
    """One GPU, and its memory's budget. `gate` and `loading` are those of all GPUs: one model is loaded at a time."""

    def __init__(self, gpu: Gpu, cuda: Cuda, memory_bytes: int | None, gate: Gate, loading: threading.Lock) -> None:
        self.gpu = gpu
        self.cuda = cuda
        self.gate = gate
        self.loading = loading
        free, _ = cuda.memory()
        self.budget = MemoryBudget(f"cuda:{gpu.index}", memory_bytes or max(0, free - HEADROOM))


@dataclass(frozen=True)
class Placement:
    """`devices`: where every model has its engines. `engines`: how many on each, and how they run."""

    devices: tuple[Device, ...] = (CPU,)
    fallback: DeviceFallback = DeviceFallback.FAIL
    settings: GpuSettings = GpuSettings()
    engines: PerModel[EngineOptions] = field(default_factory=lambda: PerModel(EngineOptions()))
    _sites: dict[int, Site] = field(default_factory=dict, repr=False)

    @classmethod
    def on(
        cls,
        choice: Choice,
        fallback: DeviceFallback,
        settings: GpuSettings,
        engines: PerModel[EngineOptions],
    ) -> Placement:
        """Raises DeviceError."""
        sites: dict[int, Site] = {}
        if any(device.gpu for device in choice.devices):
            gpus, gate, loading = Nvidia().gpus(), Gate(), threading.Lock()
            for device in choice.devices:
                cuda = Cuda.load(device.index)
                sites[device.index] = Site(gpus[device.index], cuda, settings.memory_bytes, gate, loading)
        return cls(choice.devices, fallback, settings, engines, sites)

    def devices_of(self, model: str) -> tuple[Device, ...]:
        """One for each of its engines."""
        return self.devices * self.engines.of(model).instances

    @property
    def gpu(self) -> bool:
        return self.devices[0].gpu

    @property
    def may_fall_back(self) -> bool:
        return self.gpu and self.fallback is DeviceFallback.CPU

    def on_cpu(self) -> Placement:
        return dataclasses.replace(self, devices=(CPU,))

    def engine(self, device: Device, task: Task) -> Engine:
        """Raises BundleError when ONNX Runtime does not run the model or its answers are wrong, and DeviceError when it
        is the device that does not take it."""
        if not device.gpu:
            return self._on_the_cpu(task)
        return GpuLoad(device, self._sites[device.index], self.settings, task).engine()

    def _on_the_cpu(self, task: Task) -> Engine:
        own, cores = self.engines.of(task.model.name), available_cores()
        spinning = own.spinning
        if spinning is None:
            threads = own.instances * (own.threads or cores)
            spinning = threads > own.instances and cores - threads >= _LEFT_OVER_CORES
        share = max(1, cores // own.instances)
        engine = Engine.load(task.model, task.content, task.samples, own.threads, spinning, share)
        session = engine.session
        long = fits(task.model) and engine.seconds(task.samples, 1) >= _BOUND_S
        if long and isinstance(session, ort.InferenceSession):
            engine = BoundEngine(task.model, session, HostMemory(), buckets_up_to(task.max_rows), exact=True)
        if task.proof is not None:
            task.proof(engine)
        return engine


@dataclass(frozen=True)
class Way:
    """How a model is run on a GPU: what is used, and what is used where it wins."""

    tf32: bool
    graphs: GpuChoice
    nhwc: GpuChoice

    def __str__(self) -> str:
        return f"with TF32 {'on' if self.tf32 else 'off'}, CUDA graphs {self.graphs}, NHWC {self.nhwc}"


class GpuLoad:
    """One model's way onto one GPU."""

    def __init__(self, device: Device, site: Site, settings: GpuSettings, task: Task) -> None:
        self._device, self._site, self._settings, self._task = device, site, settings, task
        self._limit = settings.model_memory.of(task.model.name)
        self._buckets = device_buckets(task.max_rows, settings.buckets) if task.model.max_batch_size else (1,)
        # Of the engine that was made last, which is the one that is served.
        self._made_with = CudaSettings()
        self._replayed: tuple[int, ...] = ()
        self._about: dict[str, object] = {"model": task.model.name}

    def engine(self) -> GpuEngine:
        with self._site.loading:
            return self._reserved()

    def _reserved(self) -> GpuEngine:
        task, limit = self._task, self._limit
        tensors = (*task.model.inputs, *task.model.outputs)
        expected = estimate(len(task.content), tensors, task.max_rows, SLOTS)
        if limit is not None and expected > limit:
            raise DeviceMemoryError(
                f"{task.model.name} needs about {expected // MIB} MiB of {self._device}, a model may have "
                f"{limit // MIB}: raise gpu_model_memory_mib or lower max_batch_size"
            )
        reservation = self._site.budget.reserve(task.model.name, max(expected, limit or 0))
        try:
            before, _ = self._site.cuda.memory()
            engine = self._proven()
        except BaseException:
            reservation.release()
            raise
        engine.on_close(reservation.release)
        engine.join(self._site.gate)
        try:
            taken = self._taken(before)
            reservation.settle(max(taken, 1))
        except BaseException:
            engine.close()
            raise
        engine.on_growth(reservation.grow)
        about = self._about | {"device": str(self._device), "gpu": self._site.gpu.name}
        about |= {"precision": task.precision.value, "tf32": self._made_with.tf32, "nhwc": self._made_with.nhwc}
        buckets = {"buckets": list(self._buckets), "graphs": list(self._replayed)}
        _LOG.info("model on the GPU", extra=about | buckets | {"memory_mib": taken // MIB})
        return engine

    def _taken(self, before: int) -> int:
        """Bytes of the device that were free `before`. Raises DeviceMemoryError where that is more than a model may
        have: but the first one is also charged for what the libraries load once and keep."""
        free, _ = self._site.cuda.memory()
        taken, limit = max(before - free, 0), self._limit
        if limit is not None and taken > limit + HEADROOM:
            raise DeviceMemoryError(
                f"{self._task.model.name} took {taken // MIB} MiB of {self._device}, a model may have {limit // MIB}: "
                "raise gpu_model_memory_mib or lower max_batch_size"
            )
        return taken

    def _proven(self) -> GpuEngine:
        """Fast first; where its answers are not close enough to PyTorch's, in full precision, and at last as plainly as
        it goes. How TensorRT rounds is not ours to choose, so there is one way, and then CUDA's."""
        full, tensorrt = self._full_precision, self._device.kind is DeviceKind.TENSORRT
        if self._task.proof is None:
            return self._tuned(full)
        fast = dataclasses.replace(full, tf32=True)
        ways = (fast,) if tensorrt else (fast, full, Way(tf32=False, graphs=GpuChoice.OFF, nhwc=GpuChoice.OFF))
        wrong: BundleError | None = None
        for way in dict.fromkeys(ways):
            if wrong is not None:
                _LOG.warning("loaded again, %s: %s", way, wrong, extra=self._about)
            engine = self._tuned(way)
            wrong = self._disproof(engine)
            if wrong is None:
                return engine
            engine.close()
        assert wrong is not None
        if not tensorrt:
            raise wrong
        self._device = Device(DeviceKind.CUDA, self._device.index)
        _LOG.warning("TensorRT's answers are wrong, on %s instead: %s", self._device, wrong, extra=self._about)
        return self._proven()

    def _disproof(self, engine: GpuEngine) -> BundleError | None:
        """What is wrong with the engine's answers; closes it where they could not be had."""
        if self._task.proof is None:
            return None
        try:
            self._task.proof(engine)
        except BundleError as error:
            traceback.clear_frames(error.__traceback__)
            return error.with_traceback(None)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            engine.close()
            raise
        return None

    @property
    def _full_precision(self) -> Way:
        """With everything else that is set and can be had for this model."""
        inputs, cuda = self._task.model.inputs, self._device.kind is DeviceKind.CUDA
        images = any(len(spec.shape) == 4 for spec in inputs)
        fixed = all(size is not None for spec in inputs for size in spec.shape[1:])
        return Way(
            tf32=False,
            graphs=self._settings.graphs if cuda and fixed and fits(self._task.model) else GpuChoice.OFF,
            nhwc=self._settings.nhwc if cuda and images else GpuChoice.OFF,
        )

    def _tuned(self, way: Way) -> GpuEngine:
        """The faster of the layouts, with graphs for the buckets where they win."""
        nhwc = way.nhwc is GpuChoice.ON or (way.nhwc is GpuChoice.AUTO and self._nhwc_wins(way.tf32))
        return self._with_graphs(CudaSettings(nhwc=nhwc, tf32=way.tf32), way.graphs)

    def _nhwc_wins(self, tf32: bool) -> bool:
        """Whether channels last are clearly faster, and as right. A model that does not run like that at all, for want
        of a kernel or of memory, is served as everything else was tested."""
        plain = self._made(CudaSettings(tf32=tf32))
        nchw_s = self._seconds(plain)
        plain.close()
        try:
            engine = self._made(CudaSettings(nhwc=True, tf32=tf32))
            nhwc_s = self._seconds(engine)
            wrong = self._disproof(engine)
            engine.close()
        except Exception as error:  # onnxruntime raises bare exceptions of many kinds
            _LOG.warning("NHWC is left: %s", str(error)[:_SAID], extra=self._about)
            return False
        if wrong is not None:
            _LOG.warning("NHWC is left: %s", wrong, extra=self._about)
            return False
        wins = nhwc_s < _NHWC_WORTHWHILE * nchw_s
        figures = {"nhwc": wins, "nchw_ms": round(nchw_s * 1e3, 3), "nhwc_ms": round(nhwc_s * 1e3, 3)}
        _LOG.info("layout chosen", extra=self._about | figures)
        return wins

    def _seconds(self, engine: GpuEngine) -> float:
        try:
            return engine.seconds(self._task.samples, self._buckets[-1])
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            engine.close()
            raise

    def _with_graphs(self, settings: CudaSettings, graphs: GpuChoice) -> GpuEngine:
        """Where the model cannot be captured (control flow, nodes on the CPU), it is run without."""
        engine = self._captured(settings, graphs) if graphs is not GpuChoice.OFF else None
        # Made only now, when what was tried is gone: two would not fit beside each other.
        return engine or self._made(settings)

    def _captured(self, settings: CudaSettings, graphs: GpuChoice) -> BoundEngine | None:
        """None: graphs do not help, or cannot be had."""
        engine: GpuEngine | None = None
        try:
            engine = self._made(dataclasses.replace(settings, graphs=True))
            if not isinstance(engine, BoundEngine) or not engine.resident:
                raise DeviceError("an input is used on the CPU, which a replay would not notice")
            won = engine.try_graphs(self._task.samples, self._site.gate, always=graphs is GpuChoice.ON)
        except Exception as error:  # onnxruntime raises bare exceptions of many kinds
            traceback.clear_frames(error.__traceback__)
            if engine is not None:
                engine.close()
            _LOG.info("no CUDA graphs: %s", str(error)[:_SAID], extra=self._about)
            return None
        _LOG.info("CUDA graphs captured", extra=self._about | {"buckets": list(won)})
        if won:
            self._replayed = won
            return engine
        engine.close()  # its plain runs keep to one stream for the graphs' sake
        return None

    def _made(self, settings: CudaSettings) -> GpuEngine:
        """An engine that has run every bucket. Raises DeviceError, or BundleError when the model does not run."""
        task, site = self._task, self._site
        memory: Memory | None = None
        engine: GpuEngine | None = None
        tensorrt = self._device.kind is DeviceKind.TENSORRT
        self._made_with, self._replayed = settings, ()
        try:
            memory = CudaMemory(site.cuda)
            settings = dataclasses.replace(settings, stream=memory.stream, memory_bytes=self._limit)
            with self._build() if tensorrt else nullcontext():
                # The session has no name here: it must be gone before its stream is.
                if fits(task.model):
                    engine = BoundEngine(task.model, self._session(settings), memory, self._buckets)
                else:
                    engine = PaddedEngine(task.model, self._session(settings), memory, self._buckets)
                # The extremes first: TensorRT builds anew for a size beyond those it saw, unless it was told them all.
                for rows in dict.fromkeys((self._buckets[-1], *self._buckets)):
                    engine.run(task.samples.tiled(rows))
        except BaseException as error:
            # The calls that failed hold the session, which must be gone before its stream is.
            traceback.clear_frames(error.__traceback__)
            if engine is not None:
                engine.close()
            elif memory is not None:
                memory.close()
            if isinstance(error, BundleError) or not isinstance(error, Exception):
                raise
            raise_if_out_of_memory(error, self._device)
            text = f"{task.model.name}: ONNX Runtime does not run the model on {self._device}: {error}"
            # What TensorRT does not build, and what CUDA fails on, may well run elsewhere: whoever allows the CPU gets
            # it there.
            raise DeviceError(text) if tensorrt or device_failed(error) else BundleError(text) from None
        return engine

    @contextmanager
    def _build(self) -> Iterator[None]:
        name = self._task.model.name
        with told("TensorRT's build", name), building(self._cache, name):
            yield

    @cached_property
    def _cache(self) -> Path:
        return cache_folder(self._settings.tensorrt_cache, self._task.content, self._site.gpu, tensorrt_versions())

    def _session(self, settings: CudaSettings) -> ort.InferenceSession:
        task, device = self._task, self._device
        if device.kind is not DeviceKind.TENSORRT:
            return create_gpu_session(task.content, device, settings)
        tensorrt = TensorRtSettings(
            cache=self._cache,
            precision=task.precision,
            # Shapes of a model that takes no batches have no rows that could be set to a batch's.
            shapes=profile_shapes(task.model.inputs, self._buckets) if task.model.max_batch_size else (),
            stream=settings.stream,
            memory_bytes=settings.memory_bytes,
        )
        try:
            return create_gpu_session(task.content, device, settings, tensorrt)
        except Exception as error:  # onnxruntime raises bare exceptions of many kinds
            if not tensorrt.shapes or not incomplete_profile(error):
                raise
        _LOG.warning(
            "TensorRT takes only parts of the model, and builds them for sizes as they come", extra=self._about
        )
        return create_gpu_session(task.content, device, settings, dataclasses.replace(tensorrt, shapes=()))


def device_buckets(max_rows: int, configured: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes that a device runs: those configured below `max_rows`, or powers of two, and itself."""
    if not configured:
        return buckets_up_to(max_rows)
    return (*sorted({rows for rows in configured if rows < max_rows}), max_rows)
