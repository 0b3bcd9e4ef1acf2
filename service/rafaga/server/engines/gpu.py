"""Loads models onto one GPU.

    session → run every bucket → compare with the golden outputs → measure

A model whose golden outputs differ too much is loaded again in full precision, and from TensorRT to CUDA.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from rafaga.errors import BundleError
from rafaga.server.config.device import Device, DeviceKind
from rafaga.server.config.settings import EngineSettings
from rafaga.server.engines.batched import Session, SessionEngine
from rafaga.server.engines.contract import Engine, run
from rafaga.server.engines.devices import Gpu
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace, measured
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
class GpuDevice:
    """One GPU. Tests bring sessions and versions of their own."""

    gpu: Gpu
    settings: EngineSettings
    create_session: Callable[[bytes, Device, SessionSettings], Session] = create_gpu_session
    versions: Callable[[], Sequence[str]] = tensorrt_versions

    def load(self, device: Device, model: ModelToPlace) -> LoadedEngine:
        """Raises BundleError when ONNX Runtime does not run the model or its golden outputs differ too much, and
        DeviceError when the device is the cause."""
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
            engine.close()
            if not tf32 or not isinstance(error, BundleError):
                raise
            about = {"model": model.spec.name, "device": str(device)}
            _LOG.warning("golden outputs differ too much, loading again: %s", error, extra=about)
        cuda = Device(DeviceKind.CUDA, device.index)
        return self._verified(cuda, model, tf32=device != cuda)

    def _loaded(self, device: Device, model: ModelToPlace, tf32: bool) -> Engine:
        """An engine that has run every bucket."""
        name, buckets = model.spec.name, self._buckets(model)
        cache = self._cache(model) if device.kind is DeviceKind.TENSORRT else None
        settings = SessionSettings(model.precision, self.settings.gpu_model_memory_mib.of(name), tf32, cache)
        engine: Engine | None = None
        try:
            with nullcontext() if cache is None else building(cache, name):
                session = self.create_session(model.content, device, settings)
                engine = SessionEngine(model.spec, session, buckets, pipelined=True)
                del session  # the engine releases it
                # The extremes first: TensorRT then builds for the whole range, and not again for what lies between.
                for rows in dict.fromkeys((model.max_rows, *buckets)):
                    run(engine, model.samples.tiled(rows))
        except BaseException as error:
            if engine is not None:
                engine.close()
            if isinstance(error, BundleError) or not isinstance(error, Exception):
                raise
            raise load_error(error, name, device) from None  # onnxruntime raises bare exceptions of many kinds
        about: dict[str, object] = {"model": name, "device": str(device), "gpu": self.gpu.name, "tf32": tf32}
        _LOG.info("model on the GPU", extra=about | {"precision": model.precision.value, "buckets": buckets})
        return engine

    def _cache(self, model: ModelToPlace) -> Path:
        return cache_folder(self.settings.tensorrt_cache, model.content, self.gpu, self.versions())

    def _buckets(self, model: ModelToPlace) -> tuple[int, ...]:
        """The batch sizes that run: those configured below the largest, or powers of two, and the largest."""
        if not self.settings.batch_buckets:
            return buckets_up_to(model.max_rows)
        return (*sorted({rows for rows in self.settings.batch_buckets if rows < model.max_rows}), model.max_rows)
