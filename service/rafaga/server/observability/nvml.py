"""What NVIDIA's driver tells of the GPUs that this process sees (NVML), as metrics.

NVML does not heed CUDA_VISIBLE_DEVICES: outside a container that shows fewer, its GPUs are those of the machine.
Only where the package nvidia-ml-py and a driver are: otherwise there are no figures, and no families.
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
    """`nvml` is the module pynvml, initialised; tests bring their own. Read at every scrape."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        count = nvml.nvmlDeviceGetCount()
        self._devices = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        self._labels = [(str(index), _text(nvml.nvmlDeviceGetName(d))) for index, d in enumerate(self._devices)]

    @classmethod
    def find(cls) -> GpuFigures | None:
        """None where there is no GPU to tell of."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            figures = cls(pynvml)
        except pynvml.NVMLError:  # no driver, or one that tells nothing
            return None
        return figures if figures._devices else None

    def collect(self) -> Iterable[GaugeMetricFamily]:
        gauges = {f: GaugeMetricFamily(f.name, f.text, labels=f.labels) for f in families.GPU_FAMILIES}
        for labels, device in zip(self._labels, self._devices, strict=True):
            for family, value in self._read(device).items():
                gauges[family].add_metric(labels, value)
        return gauges.values()

    def _read(self, device: Any) -> Mapping[Family, float]:
        """What this device tells; some lack a sensor, and parts of a GPU (MIG) lack several."""
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


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
