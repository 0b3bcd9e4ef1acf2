"""Which device is chosen, what is said about it, and what is missing: on simulated machines."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import Mock

import onnxruntime as ort
import pytest

from rafaga.errors import DeviceError
from rafaga.server.config.device import CPU, Device, DeviceFallback, DeviceKind, parse
from rafaga.server.engines import devices
from rafaga.server.engines.devices import Gpu, Nvidia, choose, needed_libraries

FAIL, FALL_BACK = DeviceFallback.FAIL, DeviceFallback.CPU
ALL = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")


@dataclass(frozen=True)
class Machine(Nvidia):
    gpu_count: int = 1
    missing: dict[DeviceKind, tuple[str, ...]] = field(default_factory=dict)
    built: tuple[str, ...] = ALL
    driver: bool = True
    broken: str = ""

    def gpus(self) -> tuple[Gpu, ...]:
        if not self.driver:
            raise DeviceError("cannot load libcuda.so.1")
        return tuple(Gpu(i, "NVIDIA Pretend", (9, 0)) for i in range(self.gpu_count))

    def missing_libraries(self, kind: DeviceKind) -> tuple[str, ...]:
        return self.missing.get(kind, ())

    def providers(self) -> Sequence[str]:
        return self.built

    def start(self, index: int) -> None:
        if self.broken:
            raise DeviceError(f"cuda:{index}: {self.broken}")


class TestAuto:
    @pytest.mark.parametrize(
        ("machine", "device", "degraded", "why"),
        [
            (Machine(), Device(DeviceKind.CUDA), False, "auto: found NVIDIA Pretend"),
            (Machine(driver=False), CPU, False, "auto: cannot load libcuda.so.1"),
            (
                Machine(missing={DeviceKind.CUDA: ("libcudnn.so.9",)}),
                CPU,
                True,
                "there is NVIDIA Pretend, but cuda:0: cannot load libcudnn.so.9",
            ),
            (Machine(broken="devices are busy (46)"), CPU, True, "NVIDIA Pretend, but cuda:0: devices are busy (46)"),
        ],
        ids=["a GPU that works", "no GPU", "a library is missing", "CUDA does not start"],
    )
    def test_the_choice(self, machine: Machine, device: Device, degraded: bool, why: str) -> None:
        choice = choose(None, FAIL, machine)
        assert (choice.devices, choice.degraded) == ((device,), degraded)
        assert why in choice.why


class TestAskedFor:
    def test_devices_that_can_be_used(self) -> None:
        assert choose((CPU,), FAIL, Machine(driver=False, built=())).devices == (CPU,)
        wanted = (Device(DeviceKind.CUDA, 0), Device(DeviceKind.CUDA, 1))
        assert choose(wanted, FAIL, Machine(gpu_count=2)).devices == wanted

    @pytest.mark.parametrize(
        ("text", "machine", "said"),
        [
            ("cuda", Machine(driver=False), "cannot load libcuda.so.1"),
            ("cuda:1", Machine(), "cuda:1: expected a GPU below 1"),
            (
                "cuda",
                Machine(missing={DeviceKind.CUDA: ("libcudart.so.13", "libcudnn.so.9")}),
                r"cuda:0: cannot load libcudart.so.13, libcudnn.so.9: pip install 'rafaga\[gpu\]'",
            ),
            (
                "tensorrt",
                Machine(missing={DeviceKind.TENSORRT: ("libnvinfer.so.10",)}),
                "tensorrt:0: cannot load libnvinfer.so.10: pip install 'tensorrt-cu13-libs<11', or put",
            ),
            (
                "tensorrt",
                Machine(missing={DeviceKind.TENSORRT: ("libcudnn.so.9", "libnvinfer.so.10")}),
                r"libcudnn.so.9, libnvinfer.so.10: pip install 'rafaga\[gpu\]' 'tensorrt-cu13-libs<11', or put",
            ),
            ("cuda", Machine(built=("CPUExecutionProvider",)), "built without CUDAExecutionProvider; install onnxr"),
            (
                "cuda",
                Machine(broken="cudaMemGetInfo: out of memory (2)"),
                r"cuda:0: cudaMemGetInfo: out of memory \(2\)",
            ),
        ],
    )
    def test_errors_list_what_is_missing(
        self, text: str, machine: Machine, said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ort, "cuda_version", "13.0", raising=False)
        with pytest.raises(DeviceError, match=said):
            choose(parse([text]), FAIL, machine)

    @pytest.mark.parametrize(
        ("machine", "why"), [(Machine(driver=False), "libcuda.so.1"), (Machine(broken="busy"), "cuda:0: busy")]
    )
    def test_a_fallback_is_reported(self, machine: Machine, why: str) -> None:
        choice = choose(parse(["cuda"]), FALL_BACK, machine)
        assert choice.devices == (CPU,)
        assert choice.degraded
        assert "fallen back to the CPU" in choice.why
        assert why in choice.why


class TestLibraries:
    def test_those_of_the_version_that_onnx_runtime_was_built_with(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ort, "cuda_version", "13.0", raising=False)
        assert "libcudart.so.13" in needed_libraries(DeviceKind.CUDA)
        assert "libnvinfer.so.10" in needed_libraries(DeviceKind.TENSORRT)
        monkeypatch.setattr(ort, "cuda_version", "12.8", raising=False)
        assert {"libcudart.so.12", "libcublas.so.12"} <= set(needed_libraries(DeviceKind.CUDA))

    def test_packages_anywhere_on_the_path_are_found(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """ONNX Runtime in one folder, PyTorch's libraries in another, TensorRT's in a third."""
        cuda, tensorrt = tmp_path / "a" / "nvidia" / "cu13" / "lib", tmp_path / "b" / "tensorrt_libs"
        there = [(cuda, name) for name in ("libcurand.so.10", "libnvrtc.so.13")]
        there += [(tensorrt, name) for name in ("libnvinfer.so.10", "libnvinfer_plugin.so.10")]
        for folder, name in there:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        loaded: set[str] = set()

        def load(name: str, *_: object) -> None:
            if not Path(name).is_file() and name not in loaded:
                raise OSError(f"{name}: cannot open shared object file")
            loaded.add(Path(name).name)

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(ort, "preload_dlls", lambda: None)
        monkeypatch.setattr(ort, "cuda_version", "13.0", raising=False)
        monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "nowhere")])
        assert Nvidia().missing_libraries(DeviceKind.TENSORRT) == (
            "libcudart.so.13",
            "libcublasLt.so.13",
            "libcublas.so.13",
            "libcudnn.so.9",
            "libnvonnxparser.so.10",
        )
        assert loaded == {name for _, name in there}

    def test_preload_prints_nothing(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcurand.so.10"))
        devices.preload()
        assert capfd.readouterr().out == ""


class FakeDriver:
    """libcuda, as far as it is asked; ctypes' objects are filled in as it would."""

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def cuInit(self, flags: object) -> int:  # noqa: N802
        return self.status

    def cuGetErrorString(self, status: ctypes.c_int, text: object) -> int:  # noqa: N802
        text._obj.value = b"no CUDA-capable device is detected"  # type: ignore[attr-defined]
        return 0

    def cuDeviceGetCount(self, count: object) -> int:  # noqa: N802
        count._obj.value = 2  # type: ignore[attr-defined]
        return 0

    def cuDeviceGet(self, device: object, index: ctypes.c_int) -> int:  # noqa: N802
        device._obj.value = index.value + 7  # type: ignore[attr-defined]
        return 0

    def cuDeviceGetName(self, name: ctypes.Array[ctypes.c_char], size: object, device: ctypes.c_int) -> int:  # noqa: N802
        name.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceGetAttribute(self, value: object, attribute: ctypes.c_int, device: object) -> int:  # noqa: N802
        value._obj.value = {75: 9, 76: 1}[attribute.value]  # type: ignore[attr-defined]
        return 0


class FakeCudart:
    """libcudart, as far as starting CUDA calls it."""

    def __init__(self) -> None:
        self.status = 0
        self.calls: list[tuple[str, object]] = []
        self.cudaGetErrorString = Mock(return_value=b"devices are busy")

    def __getattr__(self, name: str) -> Callable[[object], int]:
        def call(argument: object) -> int:
            self.calls.append((name, argument))
            return self.status

        return call


class TestDriver:
    def test_its_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeDriver())
        assert Nvidia().gpus() == (Gpu(0, "GPU 7", (9, 1)), Gpu(1, "GPU 8", (9, 1)))

    def test_cuda_does_not_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cudart = FakeCudart()
        monkeypatch.setattr(ctypes, "CDLL", lambda _: cudart)
        Nvidia().start(1)
        assert cudart.calls == [("cudaSetDevice", 1), ("cudaSetDeviceFlags", 4), ("cudaFree", None)]
        cudart.status = 46
        with pytest.raises(DeviceError, match=r"cuda:0: cudaSetDevice: devices are busy \(46\)"):
            Nvidia().start(0)

    def test_its_errors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeDriver(status=100))
        with pytest.raises(DeviceError, match=r"cuInit: no CUDA-capable device is detected \(100\)"):
            Nvidia().gpus()

    def test_without_a_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise OSError(f"{name}: cannot open shared object file")

        monkeypatch.setattr(ctypes, "CDLL", missing)
        with pytest.raises(DeviceError, match=r"no NVIDIA driver \(libcuda\.so\.1\)"):
            Nvidia().gpus()
