"""Loads models onto one GPU.

    reserve memory → session → run every bucket → compare with the golden outputs → measure

A model whose golden outputs differ too much is loaded again in full precision, and from TensorRT to CUDA.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rafaga.errors import BundleError, DeviceError, DeviceMemoryError
from rafaga.server.config.device import Device, DeviceKind
from rafaga.server.config.per_model import PerModel
from rafaga.server.engines.contract import Engine, run
from rafaga.server.engines.cuda import Cuda
from rafaga.server.engines.device_memory import CudaMemory
from rafaga.server.engines.devices import Gpu
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace, measured
from rafaga.server.engines.memory_budget import HEADROOM, MIB, MemoryBudget, estimate
from rafaga.server.engines.onnxruntime import SessionEngine
from rafaga.server.engines.pipelined import DEPTH, PipelinedEngine, has_known_outputs
from rafaga.server.engines.providers import (
    CudaSettings,
    TensorRtSettings,
    building,
    cache_folder,
    create_gpu_session,
    device_failed,
    raise_if_out_of_memory,
    tensorrt_versions,
)
from rafaga.server.scheduling.latency import buckets_up_to

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuSettings:
    """buckets: batch sizes to run; (): powers of two. memory_bytes: of each GPU, for all models; None: what is free.
    model_memory: bytes for one model; None: any. nhwc: convolutions with channels last."""

    buckets: tuple[int, ...] = ()
    memory_bytes: int | None = None
    model_memory: PerModel[int | None] = field(default_factory=lambda: PerModel(None))
    nhwc: bool = False
    tensorrt_cache: Path = Path("~/.cache/rafaga/tensorrt")


class GpuDevice:
    """One GPU, and the budget of its memory."""

    def __init__(
        self,
        gpu: Gpu,
        cuda: Cuda,
        settings: GpuSettings,
        create_session: Callable[..., Any] = create_gpu_session,
        versions: Callable[[], Sequence[str]] = tensorrt_versions,
    ) -> None:
        """Raises DeviceError."""
        self._gpu, self._cuda, self._settings = gpu, cuda, settings
        self._create_session, self._versions = create_session, versions
        free, _ = cuda.memory()
        self.budget = MemoryBudget(f"cuda:{gpu.index}", settings.memory_bytes or max(0, free - HEADROOM))
        self._loading = threading.Lock()  # one model at a time, so that what each takes can be measured

    def load(self, device: Device, model: ModelToPlace) -> LoadedEngine:
        """Raises BundleError when ONNX Runtime does not run the model or its golden outputs differ too much, and
        DeviceError when the device is the cause."""
        with self._loading:
            engine = self._verified(device, model)
        return LoadedEngine(engine, measured(engine, model.samples, self._buckets(model), stepped=True))

    def _verified(self, device: Device, model: ModelToPlace) -> Engine:
        """A model without golden outputs runs in full precision: nothing would reveal that rounding harms it."""
        cuda = Device(DeviceKind.CUDA, device.index)
        attempts = ((device, True), (cuda, True), (cuda, False)) if model.verify else ((device, False),)
        wrong: BundleError | None = None
        for at, tf32 in dict.fromkeys(attempts):
            if wrong is not None:
                about = {"model": model.spec.name, "device": str(at), "tf32": tf32}
                _LOG.warning("golden outputs differ too much, loading again: %s", wrong, extra=about)
            engine = self._loaded(at, model, tf32)
            if model.verify is None:
                return engine
            try:
                model.verify(engine)
                return engine
            except BaseException as error:
                _close(engine, error)
                if not isinstance(error, BundleError):
                    raise
                wrong = error.with_traceback(None)
        assert wrong is not None
        raise wrong

    def _loaded(self, device: Device, model: ModelToPlace, tf32: bool) -> Engine:
        """An engine that has run every bucket, and whose memory is booked."""
        name, limit = model.spec.name, self._settings.model_memory.of(model.spec.name)
        expected = estimate(len(model.content), (*model.spec.inputs, *model.spec.outputs), model.max_rows, DEPTH)
        if limit is not None and expected > limit:
            raise DeviceMemoryError(
                f"{name} needs about {expected // MIB} MiB of {device}, a model may have {limit // MIB}: raise "
                "gpu_model_memory_mib or lower max_batch_size"
            )
        reservation = self.budget.reserve(name, max(expected, limit or 0))
        release = partial(self.budget.release, reservation)
        settings = CudaSettings(memory_bytes=limit, nhwc=self._settings.nhwc, tf32=tf32)
        try:
            before, _ = self._cuda.memory()
            engine = self._run_every_bucket(device, model, settings, release)
        except BaseException:
            release()
            raise
        try:
            free, _ = self._cuda.memory()
            taken = max(1, before - free)
            # The first model is also charged for what the libraries load once and keep.
            if limit is not None and taken > limit + HEADROOM:
                raise DeviceMemoryError(
                    f"{name} took {taken // MIB} MiB of {device}, a model may have {limit // MIB}: raise "
                    "gpu_model_memory_mib or lower max_batch_size"
                )
            self.budget.settle(reservation, taken)
        except BaseException as error:
            _close(engine, error)
            raise
        about: dict[str, object] = {"model": name, "device": str(device), "gpu": self._gpu.name}
        about |= {"precision": model.precision.value, "tf32": tf32, "nhwc": settings.nhwc}
        _LOG.info("model on the GPU", extra=about | {"buckets": self._buckets(model), "memory_mib": taken // MIB})
        return engine

    def _run_every_bucket(
        self, device: Device, model: ModelToPlace, settings: CudaSettings, on_close: Callable[[], None]
    ) -> Engine:
        memory = CudaMemory(self._cuda, on_close)
        engine: Engine | None = None
        tensorrt = device.kind is DeviceKind.TENSORRT
        try:
            with self._building(model) if tensorrt else nullcontext():
                engine = self._engine(device, model, replace(settings, stream=memory.stream), memory)
                # The extremes first: TensorRT then builds for the whole range, and not again for what lies between.
                buckets = self._buckets(model)
                for rows in dict.fromkeys((buckets[-1], *buckets)):
                    run(engine, model.samples.tiled(rows))
        except BaseException as error:
            _close(engine or memory, error)
            if isinstance(error, BundleError) or not isinstance(error, Exception):
                raise
            raise_if_out_of_memory(error, device)
            text = f"{model.spec.name}: ONNX Runtime does not run the model on {device}: {error}"
            # What TensorRT does not build, and what CUDA fails on, may run elsewhere: device_fallback decides.
            raise DeviceError(text) if tensorrt or device_failed(error) else BundleError(text) from None
        return engine

    def _engine(self, device: Device, model: ModelToPlace, settings: CudaSettings, memory: CudaMemory) -> Engine:
        tensorrt = None
        if device.kind is DeviceKind.TENSORRT:
            tensorrt = TensorRtSettings(self._cache(model), model.precision, settings.stream, settings.memory_bytes)
        session = self._create_session(model.content, device, settings, tensorrt)
        if has_known_outputs(model.spec):
            return PipelinedEngine(model.spec, session, memory, self._buckets(model))
        return SessionEngine(model.spec, session, self._buckets(model), memory)

    @contextmanager
    def _building(self, model: ModelToPlace) -> Iterator[None]:
        with building(self._cache(model), model.spec.name):
            _LOG.info("TensorRT builds the model: this may take minutes", extra={"model": model.spec.name})
            yield

    def _cache(self, model: ModelToPlace) -> Path:
        return cache_folder(self._settings.tensorrt_cache, model.content, self._gpu, self._versions())

    def _buckets(self, model: ModelToPlace) -> tuple[int, ...]:
        return device_buckets(model.max_rows, self._settings.buckets) if model.spec.max_batch_size else (1,)


def device_buckets(max_rows: int, configured: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes that a device runs: those configured below `max_rows`, or powers of two, and `max_rows`."""
    if not configured:
        return buckets_up_to(max_rows)
    return (*sorted({rows for rows in configured if rows < max_rows}), max_rows)


def _close(held: Engine | CudaMemory, error: BaseException) -> None:
    """The error's frames hold the session, which must not outlive its stream."""
    traceback.clear_frames(error.__traceback__)
    held.close()
