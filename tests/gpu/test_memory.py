"""The device's memory: what a model takes is given back, as NVML sees it, and what does not fit is refused."""

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
from rafaga.server.config.per_model import PerModel
from rafaga.server.engines.cuda import Cuda
from rafaga.server.engines.memory_budget import MIB
from rafaga.server.engines.selection import Placement
from tests.bundles import publish_convolutions
from tests.gpu.conftest import task

Place = Callable[..., Placement]
# What the driver rounds to, and libraries keep once they were used.
_SLACK = 64 * MIB


@pytest.fixture
def used(device: Device) -> Callable[[], int]:
    """Bytes that are taken of the GPU, by whomever: run these tests alone on it."""
    if not device.gpu:
        pytest.skip("a rehearsal has no GPU's memory")
    nvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    nvml.nvmlInit()
    # By its place on the bus: NVML counts GPUs otherwise than CUDA, and does not heed CUDA_VISIBLE_DEVICES.
    bus = ctypes.create_string_buffer(32)
    Cuda.load(device.index).memory()  # from then on the runtime is there
    runtime = ctypes.CDLL(f"libcudart.so.{ort.cuda_version.partition('.')[0]}")
    assert runtime.cudaDeviceGetPCIBusId(bus, len(bus), device.index) == 0
    handle = nvml.nvmlDeviceGetHandleByPciBusId(bus.value)

    def used() -> int:
        gc.collect()
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)

    return used


def test_unloading_gives_it_back(place: Place, device: Device, tmp_path: Path, used: Callable[[], int]) -> None:
    given = dataclasses.replace(task(publish_convolutions(tmp_path))[0], max_rows=4096)
    placement = place()
    assert placement.load(device, given).engine.close()  # the first loads the libraries, which stay
    before = used()
    for _ in range(3):
        engine = placement.load(device, given).engine
        assert used() > before, "its buffers are there"
        assert engine.close()
        del engine
        assert used() <= before + _SLACK
    assert placement.gpus[device.index].budget.taken == 0


def test_what_does_not_fit_is_refused(place: Place, device: Device, tmp_path: Path) -> None:
    if not device.gpu:
        pytest.skip("a rehearsal has no GPU's memory")
    given, _, _ = task(publish_convolutions(tmp_path))
    with pytest.raises(DeviceMemoryError, match="are left"):
        place(memory_bytes=64 * MIB).load(device, given)


def test_a_limit_of_the_arena_holds(place: Place, device: Device, tmp_path: Path) -> None:
    """Activations of 8,192 images pass 300 MiB: it is refused at load, with a reason, and nothing stays behind."""
    if not device.gpu:
        pytest.skip("a rehearsal has no GPU's memory")
    large = dataclasses.replace(task(publish_convolutions(tmp_path))[0], max_rows=8192)
    placement = place(model_memory=PerModel(400 * MIB))
    with pytest.raises(DeviceMemoryError):
        placement.load(device, large)
    assert placement.gpus[device.index].budget.taken == 0
