"""The device's memory: what a model takes is given back, as NVML sees it, and a limit holds."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest

from rafaga.errors import DeviceMemoryError
from rafaga.server.config.device import Device
from rafaga.server.engines.devices import Nvidia
from tests.bundles import publish_convolutions
from tests.gpu.conftest import Load, placed, task

# What the driver rounds to, and libraries keep once they were used.
_SLACK = 64 * 2**20


@pytest.fixture
def used(device: Device) -> Callable[[], int]:
    """Bytes that are taken of the GPU, by whomever: run these tests alone on it."""
    if not device.gpu:
        pytest.skip("a rehearsal has no GPU's memory")
    nvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    nvml.nvmlInit()
    # By its place on the bus: NVML counts GPUs otherwise than CUDA, and does not heed CUDA_VISIBLE_DEVICES.
    bus = ctypes.create_string_buffer(32)
    Nvidia().start(device.index)  # from then on the runtime is there
    runtime = ctypes.CDLL(f"libcudart.so.{ort.cuda_version.partition('.')[0]}")
    assert runtime.cudaDeviceGetPCIBusId(bus, len(bus), device.index) == 0
    handle = nvml.nvmlDeviceGetHandleByPciBusId(bus.value)

    def used() -> int:
        gc.collect()
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)

    return used


def test_unloading_gives_it_back(device: Device, tmp_path: Path, used: Callable[[], int]) -> None:
    given = dataclasses.replace(task(publish_convolutions(tmp_path))[0], max_rows=4096)
    placement = placed(device)
    assert placement.load(device, given).engine.close()  # the first loads the libraries, which stay
    before = used()
    for _ in range(3):
        engine = placement.load(device, given).engine
        assert used() > before, "it has run there"
        assert engine.close()
        del engine
        assert used() <= before + _SLACK


def test_a_limit_of_the_arena_holds(load: Load, device: Device, tmp_path: Path) -> None:
    """Activations of 8,192 images pass 300 MiB: it is refused at load, with a reason."""
    if not device.gpu:
        pytest.skip("a rehearsal has no GPU's memory")
    large = dataclasses.replace(task(publish_convolutions(tmp_path))[0], max_rows=8192)
    with pytest.raises(DeviceMemoryError):
        load(large, gpu_model_memory_mib=400)
