"""Metrics of the GPUs, read from NVIDIA's driver (NVML).

NVML ignores CUDA_VISIBLE_DEVICES: its GPUs are those of the machine, or of the container. Without the package
nvidia-ml-py or a driver there are no metrics of GPUs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from rafaga.server.observability import families
from rafaga.server.observability.families import Family


class GpuFigures(Collector):
    """Reads at every scrape. nvml: the module pynvml, initialised; tests pass a fake."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        count = nvml.nvmlDeviceGetCount()
        self._devices = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        self._labels = [(str(index), nvml.nvmlDeviceGetName(d)) for index, d in enumerate(self._devices)]

    @classmethod
    def find(cls) -> GpuFigures | None:
        """None without a GPU that NVML can read."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            figures = cls(pynvml)
        except pynvml.NVMLError:  # no usable driver
            return None
        return figures if figures._devices else None

    def collect(self) -> Iterable[GaugeMetricFamily]:
        gauges = {f: GaugeMetricFamily(f.name, f.text, labels=f.labels) for f in families.GPU_FAMILIES}
        for labels, device in zip(self._labels, self._devices, strict=True):
            for family, value in self._read(device).items():
                gauges[family].add_metric(labels, value)
        return gauges.values()

    def _read(self, device: Any) -> Mapping[Family, float]:
        """The values that this device has: some GPUs lack a sensor, and MIG instances lack several."""
        nvml, found = self._nvml, {}
        with contextlib.suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(device)
            found[families.GPU_MEMORY_USED] = float(memory.used)
            found[families.GPU_MEMORY_TOTAL] = float(memory.total)
        with contextlib.suppress(nvml.NVMLError):
            found[families.GPU_UTILISATION] = nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
        with contextlib.suppress(nvml.NVMLError):
            found[families.GPU_POWER] = nvml.nvmlDeviceGetPowerUsage(device) / 1000  # from milliwatts
        return found
