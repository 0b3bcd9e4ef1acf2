"""Metrics of GPUs are read at each scrape; without a GPU there are none."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from rafaga.errors import DeviceError
from rafaga.server.engines.devices import Nvidia
from rafaga.server.observability import families
from rafaga.server.observability.metrics import Metrics
from rafaga.server.observability.nvml import GpuFigures
from tests.unit.server.fake_nvml import FakeNvml


def test_each_gpu_has_its_index_as_label() -> None:
    registry = Metrics(gpus=GpuFigures(FakeNvml())).registry

    def value(name: str, gpu: int) -> float | None:
        return registry.get_sample_value(f"rafaga_gpu_{name}", {"gpu": str(gpu), "product": f"GPU of kind {gpu}"})

    assert [value("utilisation_ratio", gpu) for gpu in (0, 1)] == [0.25, 0.5]
    assert [value("memory_used_bytes", gpu) for gpu in (0, 1)] == [500, 1000]
    assert [value("memory_total_bytes", gpu) for gpu in (0, 1)] == [2000, 2000]
    assert [value("power_watts", gpu) for gpu in (0, 1)] == [75.5, None], "the second has no sensor"
    names = {family.name for family in registry.collect() if family.name.startswith("rafaga_gpu")}
    assert names == {family.name for family in families.GPU_FAMILIES}


def test_a_missing_sensor_hides_no_other() -> None:
    class PartOfAGpu(FakeNvml):
        def nvmlDeviceGetUtilizationRates(self, device: int) -> Any:  # noqa: N802
            raise self.NVMLError("Not Supported")

    registry = Metrics(gpus=GpuFigures(PartOfAGpu(devices=1))).registry
    exposed = {metric.name for metric in registry.collect() if metric.name.startswith("rafaga_gpu") and metric.samples}
    assert exposed == {family.name for family in families.GPU_FAMILIES} - {families.GPU_UTILISATION.name}


@pytest.mark.parametrize("nvml", [FakeNvml(devices=0), FakeNvml(driver=False), None], ids=["none", "driver", "package"])
def test_without_a_gpu_there_are_no_metrics(nvml: FakeNvml | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert GpuFigures.find() is None
    assert not any(
        family.name.startswith("rafaga_gpu") for family in Metrics(gpus=GpuFigures.find()).registry.collect()
    )


@pytest.mark.gpu
def test_a_real_gpu_is_read() -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    try:
        Nvidia().gpus()
    except DeviceError as error:
        pytest.skip(f"no GPU: {error}")
    figures = GpuFigures.find()
    assert figures is not None
    (total,) = (f for f in figures.collect() if f.name == families.GPU_MEMORY_TOTAL.name)
    assert total.samples[0].value > 2**30
