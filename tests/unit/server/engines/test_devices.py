"""Which device is chosen, what is said about it, and what is missing: on simulated machines."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import onnxruntime as ort
import pytest

from rafaga.errors import DeviceError
from rafaga.server.config.device import CPU, Device, DeviceFallback, DeviceKind, parse
from rafaga.server.engines import devices
from rafaga.server.engines.devices import Gpu, Nvidia, choose, needed_libraries

FAIL, FALL_BACK = DeviceFallback.FAIL, DeviceFallback.CPU
CUDA = Device(DeviceKind.CUDA)
ALL = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")


@pytest.fixture(autouse=True)
def cuda_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "cuda_version", "13.0", raising=False)


@dataclass(frozen=True)
class Machine(Nvidia):
    gpu_count: int = 1
    missing: tuple[str, ...] = ()
    built: tuple[str, ...] = ALL
    driver: bool = True
    broken: str = ""

    def gpus(self) -> tuple[Gpu, ...]:
        if not self.driver:
            raise DeviceError("cannot load libcuda.so.1")
        return tuple(Gpu(i, "NVIDIA Pretend", (9, 0)) for i in range(self.gpu_count))

    def missing_libraries(self, kind: DeviceKind) -> tuple[str, ...]:
        return self.missing

    def providers(self) -> Sequence[str]:
        return self.built

    def start(self, index: int) -> None:
        if self.broken:
            raise DeviceError(f"cuda:{index}: {self.broken}")


@pytest.mark.parametrize(
    ("machine", "device", "degraded", "why"),
    [
        (Machine(), CUDA, False, "auto: found NVIDIA Pretend"),
        (Machine(driver=False), CPU, False, "auto: cannot load libcuda.so.1"),
        (Machine(missing=("libcudnn.so.9",)), CPU, True, "NVIDIA Pretend, but cuda:0: cannot load libcudnn.so.9"),
        (Machine(broken="devices are busy (46)"), CPU, True, "NVIDIA Pretend, but cuda:0: devices are busy (46)"),
    ],
    ids=["a GPU that works", "no GPU", "a library is missing", "CUDA does not start"],
)
def test_auto(machine: Machine, device: Device, degraded: bool, why: str) -> None:
    choice = choose(None, FAIL, machine)
    assert (choice.devices, choice.degraded) == ((device,), degraded)
    assert why in choice.why


def test_devices_that_can_be_used() -> None:
    assert choose((CPU,), FAIL, Machine(driver=False, built=())).devices == (CPU,)
    wanted = (CUDA, Device(DeviceKind.CUDA, 1))
    assert choose(wanted, FAIL, Machine(gpu_count=2)).devices == wanted


@pytest.mark.parametrize(
    ("text", "machine", "said"),
    [
        ("cuda", Machine(driver=False), "cannot load libcuda.so.1"),
        ("cuda:1", Machine(), "cuda:1: expected a GPU below 1"),
        (
            "cuda",
            Machine(missing=("libcudart.so.13", "libcudnn.so.9")),
            "cuda:0: cannot load libcudart.so.13, libcudnn.so.9: pip install 'rafaga[gpu]'",
        ),
        (
            "tensorrt",
            Machine(missing=("libnvinfer.so.10",)),
            "tensorrt:0: cannot load libnvinfer.so.10: pip install 'tensorrt-cu13-libs<11', or put",
        ),
        (
            "tensorrt",
            Machine(missing=("libcudnn.so.9", "libnvinfer.so.10")),
            "libcudnn.so.9, libnvinfer.so.10: pip install 'rafaga[gpu]' 'tensorrt-cu13-libs<11', or put",
        ),
        ("cuda", Machine(built=("CPUExecutionProvider",)), "built without CUDAExecutionProvider; install onnxr"),
        ("cuda", Machine(broken="out of memory (2)"), "cuda:0: out of memory (2)"),
    ],
)
def test_what_is_missing_is_an_error_or_the_reason_for_the_cpu(text: str, machine: Machine, said: str) -> None:
    with pytest.raises(DeviceError, match=re.escape(said)):
        choose(parse([text]), FAIL, machine)
    choice = choose(parse([text]), FALL_BACK, machine)
    assert (choice.devices, choice.degraded) == ((CPU,), True)
    assert "fallen back to the CPU" in choice.why
    assert said in choice.why


class TestLibraries:
    def test_those_of_the_version_that_onnx_runtime_was_built_with(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "libcudart.so.13" in needed_libraries(DeviceKind.CUDA)
        assert "libnvinfer.so.10" in needed_libraries(DeviceKind.TENSORRT)
        monkeypatch.setattr(ort, "cuda_version", "12.8", raising=False)
        assert {"libcudart.so.12", "libcublas.so.12"} <= set(needed_libraries(DeviceKind.CUDA))

    def test_packages_anywhere_on_the_path_are_found(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """ONNX Runtime in one folder, PyTorch's libraries in another, TensorRT's in a third."""
        there = {
            tmp_path / "a" / "nvidia" / "cu13" / "lib": ("libcurand.so.10", "libnvrtc.so.13"),
            tmp_path / "b" / "tensorrt_libs": ("libnvinfer.so.10", "libnvinfer_plugin.so.10"),
        }
        for folder, names in there.items():
            folder.mkdir(parents=True)
            for name in names:
                (folder / name).touch()
        loaded: set[str] = set()

        def load(name: str, *_: object) -> None:
            if not Path(name).is_file() and name not in loaded:
                raise OSError(f"{name}: cannot open shared object file")
            loaded.add(Path(name).name)

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(ort, "preload_dlls", lambda: None)
        monkeypatch.setattr(sys, "path", [str(tmp_path / folder) for folder in ("a", "b", "nowhere")])
        missing = Nvidia().missing_libraries(DeviceKind.TENSORRT)
        assert loaded == {name for names in there.values() for name in names}
        assert set(missing) == set(needed_libraries(DeviceKind.TENSORRT)) - loaded

    def test_preload_prints_nothing(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcurand.so.10"))
        devices.preload()
        assert capfd.readouterr().out == ""


def filled(argument: object, value: object) -> int:
    """As a C function fills in what it was given by reference."""
    getattr(argument, "_obj", argument).value = value  # type: ignore[attr-defined]
    return 0


def driver(status: int = 0) -> SimpleNamespace:
    """libcuda, as far as it is asked."""
    return SimpleNamespace(
        cuInit=lambda _: status,
        cuGetErrorString=lambda _, text: filled(text, b"no CUDA-capable device is detected"),
        cuDeviceGetCount=lambda count: filled(count, 2),
        cuDeviceGet=lambda device, index: filled(device, index.value + 7),
        cuDeviceGetName=lambda name, _, device: filled(name, f"GPU {device.value}".encode()),
        cuDeviceGetAttribute=lambda value, attribute, _: filled(value, {75: 9, 76: 1}[attribute.value]),
    )


class TestDriver:
    def test_its_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda _: driver())
        assert Nvidia().gpus() == (Gpu(0, "GPU 7", (9, 1)), Gpu(1, "GPU 8", (9, 1)))

    def test_its_errors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda _: driver(status=100))
        with pytest.raises(DeviceError, match=r"cuInit: no CUDA-capable device is detected \(100\)"):
            Nvidia().gpus()
        monkeypatch.setattr(ctypes, "CDLL", Mock(side_effect=OSError("cannot open shared object file")))
        with pytest.raises(DeviceError, match=r"no NVIDIA driver \(libcuda\.so\.1\)"):
            Nvidia().gpus()

    def test_cuda_does_not_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        steps = ("cudaSetDevice", "cudaSetDeviceFlags", "cudaFree")
        cudart = Mock(**{f"{step}.return_value": 0 for step in steps})
        monkeypatch.setattr(ctypes, "CDLL", lambda _: cudart)
        Nvidia().start(1)
        assert cudart.mock_calls == [call.cudaSetDevice(1), call.cudaSetDeviceFlags(4), call.cudaFree(None)]
        cudart.cudaSetDevice.return_value = 46
        cudart.cudaGetErrorString.return_value = b"devices are busy"
        with pytest.raises(DeviceError, match=r"cuda:0: cudaSetDevice: devices are busy \(46\)"):
            Nvidia().start(0)
