"""Loads models onto one GPU.

    reserve memory → session → run every bucket → compare with the golden outputs → measure

A model whose golden outputs differ too much is loaded again in full precision, and from TensorRT to CUDA.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rafaga.errors import BundleError
from rafaga.server.config.device import Device, DeviceKind
from rafaga.server.config.per_model import PerModel
from rafaga.server.engines.contract import DEPTH, Engine, run
from rafaga.server.engines.cuda import Cuda
from rafaga.server.engines.cuda_engine import CudaEngine, has_known_outputs
from rafaga.server.engines.device_memory import CudaMemory
from rafaga.server.engines.devices import Gpu
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace, measured
from rafaga.server.engines.memory_budget import HEADROOM, MIB, MemoryBudget, estimate
from rafaga.server.engines.onnxruntime import SessionEngine
from rafaga.server.engines.providers import (
    SessionSettings,
    building,
    cache_folder,
    create_gpu_session,
    load_error,
    tensorrt_versions,
)
from rafaga.server.scheduling.latency import buckets_up_to

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuSettings:
    """buckets: batch sizes to run; (): powers of two. memory_bytes: of each GPU, for all models; None: what is free.
    model_memory: bytes for one model; None: any."""

    buckets: tuple[int, ...] = ()
    memory_bytes: int | None = None
    model_memory: PerModel[int | None] = field(default_factory=lambda: PerModel(None))
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
            # Without golden outputs in full precision: nothing would reveal that rounding harms the model.
            engine = self._verified(device, model, tf32=model.verify is not None)
        return LoadedEngine(engine, measured(engine, model.samples, self._buckets(model), stepped=True))

    def _verified(self, device: Device, model: ModelToPlace, tf32: bool) -> Engine:
        engine = self._loaded(device, model, tf32)
        try:
            if model.verify is not None:
                model.verify(engine)
            return engine
        except BaseException as error:
            _close(engine, error)
            if not tf32 or not isinstance(error, BundleError):
                raise
            about = {"model": model.spec.name, "device": str(device)}
            _LOG.warning("golden outputs differ too much, loading again: %s", error, extra=about)
        cuda = Device(DeviceKind.CUDA, device.index)
        return self._verified(cuda, model, tf32=device != cuda)

    def _loaded(self, device: Device, model: ModelToPlace, tf32: bool) -> Engine:
        """An engine that has run every bucket, and whose memory is booked."""
        name, limit = model.spec.name, self._settings.model_memory.of(model.spec.name)
        expected = estimate(len(model.content), (*model.spec.inputs, *model.spec.outputs), model.max_rows, DEPTH)
        reservation = self.budget.reserve(name, expected, limit)
        held: Engine | CudaMemory | None = None
        try:
            before, _ = self._cuda.memory()
            held = memory = CudaMemory(self._cuda, on_close=partial(self.budget.release, reservation))
            cache = self._cache(model) if device.kind is DeviceKind.TENSORRT else None
            settings = SessionSettings(memory.stream, model.precision, limit, tf32, cache)
            with nullcontext() if cache is None else building(cache, name):
                held = engine = self._engine(device, model, settings, memory)
                # The extremes first: TensorRT then builds for the whole range, and not again for what lies between.
                for rows in dict.fromkeys((model.max_rows, *self._buckets(model))):
                    run(engine, model.samples.tiled(rows))
            free, _ = self._cuda.memory()
            self.budget.settle(reservation, max(0, before - free))
        except BaseException as error:
            _close(held, error)
            self.budget.release(reservation)
            if isinstance(error, BundleError) or not isinstance(error, Exception):
                raise
            raise load_error(error, name, device) from None  # onnxruntime raises bare exceptions of many kinds
        about: dict[str, object] = {"model": name, "device": str(device), "gpu": self._gpu.name, "tf32": tf32}
        about |= {"precision": model.precision.value, "buckets": self._buckets(model)}
        _LOG.info("model on the GPU", extra=about | {"memory_mib": reservation.size // MIB})
        return engine

    def _engine(self, device: Device, model: ModelToPlace, settings: SessionSettings, memory: CudaMemory) -> Engine:
        session = self._create_session(model.content, device, settings)
        if has_known_outputs(model.spec):
            return CudaEngine(model.spec, session, memory, self._buckets(model))
        return SessionEngine(model.spec, session, self._buckets(model), memory)

    def _cache(self, model: ModelToPlace) -> Path:
        return cache_folder(self._settings.tensorrt_cache, model.content, self._gpu, self._versions())

    def _buckets(self, model: ModelToPlace) -> tuple[int, ...]:
        return device_buckets(model.max_rows, self._settings.buckets)


def device_buckets(max_rows: int, configured: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes that a device runs: those configured below `max_rows`, or powers of two, and `max_rows`."""
    if not configured:
        return buckets_up_to(max_rows)
    return (*sorted({rows for rows in configured if rows < max_rows}), max_rows)


def _close(held: Engine | CudaMemory | None, error: BaseException) -> None:
    """The error's frames hold the session, which must not outlive its stream."""
    traceback.clear_frames(error.__traceback__)
    if held is not None:
        held.close()
