"""Which engine each model gets, on which device, and with how many threads. Decided at load."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from rafaga.bundle import EngineName
from rafaga.errors import BundleError
from rafaga.server.config.device import CPU, Device, DeviceFallback
from rafaga.server.config.settings import EngineSettings
from rafaga.server.engines.batched import Session, SessionEngine
from rafaga.server.engines.contract import Engine
from rafaga.server.engines.cpu_count import available_cores
from rafaga.server.engines.devices import DeviceChoice, Nvidia
from rafaga.server.engines.gpu import GpuDevice
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace, measured, run_seconds
from rafaga.server.engines.onnxruntime import create_session
from rafaga.server.engines.openvino import OpenVinoSession, compiled
from rafaga.server.scheduling.latency import LatencyTable, buckets_up_to

# Below this a second thread costs more in waking up than it computes, and ONNX Runtime is the fastest engine: a run in
# OpenVINO costs 0.2 ms more from Python.
QUICK_S = 1e-3
# Handing a batch to another thread and back takes 0.2 ms: too much for small models.
_PIPELINED_S = 10e-3
# The predicted time of a run of which nothing is known; runs correct it.
_UNKNOWN_S = 0.1
# Threads may spin if so many cores are left for the transport, the decoders and other processes.
_SPARE_CORES = 4


class CpuThreads(NamedTuple):
    """Of one engine. fixed: None: one for small models, else `share`. share: of the cores that this process may use.
    spinning: ONNX Runtime's, while they wait for work."""

    fixed: int | None
    share: int
    spinning: bool


@dataclass(frozen=True)
class Placement:
    """devices: where every model has its engines. gpus: by index, for all `devices` that are GPUs. pipelined_s: seconds
    per row from which an engine on the CPU is pipelined. auto_instances, auto_spinning: of models where these are not
    configured.
    """

    devices: tuple[Device, ...] = (CPU,)
    settings: EngineSettings = field(default_factory=EngineSettings)
    gpus: Mapping[int, GpuDevice] = field(default_factory=dict, repr=False)
    cores: int = field(default_factory=available_cores)
    pipelined_s: float = _PIPELINED_S
    auto_instances: int = 1
    auto_spinning: bool = False

    @classmethod
    def on(cls, choice: DeviceChoice, settings: EngineSettings) -> Placement:
        """Raises DeviceError."""
        indices = [device.index for device in choice.devices if device.gpu]
        found = Nvidia().gpus() if indices else ()
        return cls(choice.devices, settings, {index: GpuDevice(found[index], settings) for index in indices})

    def devices_of(self, model: str) -> tuple[Device, ...]:
        """One for each of its engines."""
        return self.devices * self._instances(model)

    def _instances(self, model: str) -> int:
        return self.settings.instances.of(model) or self.auto_instances

    def instances_are_free(self, model: str) -> bool:
        """To be chosen by measuring: on the CPU, if their threads are not configured either."""
        configured = self.settings.instances.of(model) or self.settings.threads.of(model)
        return not self.gpu and not configured and self.cores > 1

    def spinning_is_free(self, model: str) -> bool:
        """To be chosen by measuring: where there are threads to wait for, and cores left for others."""
        fixed = self.settings.threads.of(model)
        if self.gpu or fixed in (None, 1) or self.settings.spinning.of(model) is not None:
            return False
        return self.cores - self._instances(model) * fixed >= _SPARE_CORES

    def engine_of(self, model: str) -> EngineName | None:
        """As configured; None: the fastest. GPUs have ONNX Runtime."""
        return EngineName.ONNXRUNTIME if self.gpu else self.settings.engine.of(model)

    @property
    def gpu(self) -> bool:
        return self.devices[0].gpu

    @property
    def may_fall_back(self) -> bool:
        return self.gpu and self.settings.device_fallback is DeviceFallback.CPU

    def on_cpu(self) -> Placement:
        return dataclasses.replace(self, devices=(CPU,))

    def cpu_threads(self, model: str) -> CpuThreads:
        instances, fixed = self._instances(model), self.settings.threads.of(model)
        spinning = self.settings.spinning.of(model)
        spinning = self.auto_spinning if spinning is None else spinning
        return CpuThreads(fixed, max(1, self.cores // instances), spinning)

    def load(self, device: Device, model: ModelToPlace) -> LoadedEngine:
        """A verified and warm engine.

        Raises BundleError when ONNX Runtime does not run the model or its answers are wrong, and DeviceError when the
        device is the cause.
        """
        if not model.samples.valid:
            return self._untried(device, model)
        if device.gpu:
            return self.gpus[device.index].load(device, model)
        engine = self._on_cpu(model)
        if model.verify is not None:
            model.verify(engine)
        return LoadedEngine(engine, measured(engine, model.samples, buckets_up_to(model.max_rows)))

    def _untried(self, device: Device, model: ModelToPlace) -> LoadedEngine:
        """Without a run: nothing is known of its time and memory."""
        name, threads = model.spec.name, self.cpu_threads(model.spec.name)
        if device.gpu:
            raise BundleError(f"{name}: fails on every input that was tried, so it is not known to run on {device}")
        engine = opened(model, threads.fixed or threads.share, threads.spinning)()
        return LoadedEngine(engine, LatencyTable((1,), (_UNKNOWN_S,)))

    def _on_cpu(self, model: ModelToPlace) -> Engine:
        threads = self.cpu_threads(model.spec.name)
        try:
            start = opened(model, threads.fixed or threads.share, threads.spinning)
            engine = start()
            (seconds,) = run_seconds(engine, [model.samples.tiled(1)])
            if seconds >= self.pipelined_s:
                return start(pipelined=True)
            if threads.fixed is None and threads.share > 1 and seconds < QUICK_S:
                return opened(model, 1, threads.spinning)()
        except Exception as error:  # runtimes raise bare exceptions of many kinds
            name = "OpenVINO" if model.engine is EngineName.OPENVINO else "ONNX Runtime"
            raise BundleError(f"{model.spec.name}: {name} does not run the model: {error}") from None
        return engine


def opened(model: ModelToPlace, threads: int, spinning: bool) -> Callable[..., Engine]:
    """Loads the model on the CPU; gives engines, with `pipelined=True` pipelined ones. Raises what the runtime raises,
    bare exceptions of many kinds."""
    if model.engine is EngineName.OPENVINO:
        session: Session = OpenVinoSession(model.spec, compiled(model.content, threads, model.precision))
    else:
        session = create_session(model.content, threads, spinning)
    return partial(SessionEngine, model.spec, session)


EngineFactory = Callable[[Placement, Device, ModelToPlace], LoadedEngine]
"""Loads one engine: `Placement.load`, or what tests put in its place."""
