"""Which devices models run on: what was asked for, what is there, and what is missing where the two differ.

Nothing here needs a GPU or its libraries to be imported. NVIDIA's driver is asked through its own library, because
that is there exactly where a GPU can be used.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnxruntime as ort

from rafaga.errors import DeviceError
from rafaga.server.config.device import CPU, Device, DeviceFallback, DeviceKind
from rafaga.server.engines.cuda import Cuda

# ONNX Runtime looks for it, and does without.
_PLUGINS = "libnvinfer_plugin.so.10"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
# The oldest GPUs that a CUDA version compiles for, by its first number.
_OLDEST = {"13": (7, 5)}


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver tells of it."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int


class System(Protocol):
    """The machine: what it has, and what it lacks."""

    def gpus(self) -> tuple[Gpu, ...]:
        """Raises DeviceError when there is no usable driver."""

    def newest_cuda(self) -> tuple[int, int]:
        """The version that the driver runs programs of. Raises DeviceError."""

    def missing_libraries(self, kind: DeviceKind) -> tuple[str, ...]:
        """Shared libraries that `kind` needs and that cannot be loaded."""

    def providers(self) -> Sequence[str]:
        """What ONNX Runtime was built with."""

    def start(self, index: int) -> None:
        """Has CUDA begin on that GPU, once nothing is missing. Raises DeviceError where it does not: another process
        has the GPU for itself, its memory is full or broken."""


@dataclass(frozen=True)
class Choice:
    """Where models run, one engine per device; `why` is for the log. `degraded`: something better was not usable."""

    devices: tuple[Device, ...]
    why: str
    degraded: bool = False


def choose(wanted: tuple[Device, ...] | None, fallback: DeviceFallback, system: System) -> Choice:
    """Raises DeviceError when a device that was asked for cannot be used and `fallback` does not allow the CPU."""
    if wanted is None:
        try:
            gpus = system.gpus()
        except DeviceError as error:
            return Choice((CPU,), f"auto: no GPU ({error})")
        device = Device(DeviceKind.CUDA)
        try:
            _start(device, system)
        except DeviceError as error:
            return Choice((CPU,), f"auto: there is {gpus[0].name}, but {error}", degraded=True)
        return Choice((device,), f"auto: found {gpus[0].name}")
    try:
        for device in wanted:
            _start(device, system)
    except DeviceError as error:
        if fallback is DeviceFallback.FAIL:
            raise
        return Choice((CPU,), f"fallen back to the CPU, as device_fallback allows: {error}", degraded=True)
    return Choice(wanted, "as configured")


def _start(device: Device, system: System) -> None:
    """Raises DeviceError as `check` does, and where nothing is missing but CUDA does not begin."""
    check(device, system)
    if device.gpu:
        system.start(device.index)


def check(device: Device, system: System) -> None:
    """Raises DeviceError saying what keeps `device` from being used, and what to do. Takes nothing of the GPU."""
    if not device.gpu:
        return
    if device.provider not in system.providers():
        raise DeviceError(
            f"{device}: this ONNX Runtime was built without {device.provider}; install onnxruntime-gpu in its place"
        )
    gpus = system.gpus()
    if device.index >= len(gpus):
        raise DeviceError(f"{device}: expected a GPU below {len(gpus)}, which is how many this process sees")
    _check_versions(device, gpus[device.index], system.newest_cuda())
    if missing := system.missing_libraries(device.kind):
        of_tensorrt = [name for name in missing if name.startswith("libnv")]
        packages = ["'rafaga[gpu]'"] if len(of_tensorrt) < len(missing) else []
        packages += [f"'tensorrt-cu{_cuda_major()}-libs<11'"] if of_tensorrt else []
        what, how = ", ".join(missing), " ".join(packages)
        raise DeviceError(f"{device}: cannot load {what}: pip install {how}, or put them on LD_LIBRARY_PATH")


def _check_versions(device: Device, gpu: Gpu, newest: tuple[int, int]) -> None:
    """Within one first number of CUDA's version, older drivers run newer programs."""
    built, oldest = _cuda_major(), _OLDEST.get(_cuda_major(), (0, 0))
    if newest[0] < int(built):
        raise DeviceError(
            f"{device}: NVIDIA's driver runs CUDA up to {newest[0]}.{newest[1]}, this ONNX Runtime needs {built}: "
            "update the driver"
        )
    if gpu.capability < oldest:
        is_of, needs = (".".join(map(str, version)) for version in (gpu.capability, oldest))
        raise DeviceError(f"{device}: {gpu.name} has compute capability {is_of}, CUDA {built} needs {needs} or more")


class Nvidia:
    """This machine, as NVIDIA's driver and the dynamic loader see it."""

    def gpus(self) -> tuple[Gpu, ...]:
        driver = _driver()
        count = ctypes.c_int()
        _ask(driver, "cuDeviceGetCount", ctypes.byref(count))
        if not count.value:
            raise DeviceError("NVIDIA's driver is there, but shows this process no GPU")
        return tuple(self._gpu(driver, index) for index in range(count.value))

    @staticmethod
    def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        _ask(driver, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        _ask(driver, "cuDeviceGetName", name, ctypes.c_int(len(name)), device)
        _ask(driver, "cuDeviceGetAttribute", ctypes.byref(major), ctypes.c_int(_CAPABILITY_MAJOR), device)
        _ask(driver, "cuDeviceGetAttribute", ctypes.byref(minor), ctypes.c_int(_CAPABILITY_MINOR), device)
        _ask(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        return Gpu(index, name.value.decode(), (major.value, minor.value), memory.value)

    def newest_cuda(self) -> tuple[int, int]:
        version = ctypes.c_int()
        _ask(_driver(), "cuDriverGetVersion", ctypes.byref(version))
        return version.value // 1000, version.value % 1000 // 10

    def missing_libraries(self, kind: DeviceKind) -> tuple[str, ...]:
        preload()
        return tuple(name for name in needed_libraries(kind) if not _loads(name))

    def providers(self) -> Sequence[str]:
        return tuple(ort.get_available_providers())

    def start(self, index: int) -> None:
        Cuda.load(index).memory()


def preload() -> str:
    """Loads what CUDA and TensorRT need from this environment's packages, which the system's loader does not find.

    Gives what ONNX Runtime has to say about it. Without this, a session on the GPU quietly becomes one on the CPU. ONNX
    Runtime looks beside itself alone; where it lies in another folder than PyTorch, so do the libraries.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(OSError):
        ort.preload_dlls()
    folders = [
        folder
        for path in map(Path, sys.path)
        for folder in (*path.glob("nvidia/*/lib"), path / "tensorrt_libs")
        if folder.is_dir()
    ]
    # cuDNN loads the compiler by its name when a kernel wants it, and does without for most.
    compiler = f"libnvrtc.so.{_cuda_major()}"
    for name in (*needed_libraries(DeviceKind.TENSORRT), compiler, _PLUGINS):
        if not _loads(name):
            # Any will do: once one is loaded, those that need it find it by its name.
            any(_loads(str(folder / name)) for folder in folders if (folder / name).is_file())
    return said.getvalue()


def needed_libraries(kind: DeviceKind) -> tuple[str, ...]:
    """Beside the driver's own, those that others need first. The CUDA version is that of ONNX Runtime's build."""
    if kind is DeviceKind.CPU:
        return ()
    own = tuple(f"lib{name}.so.{_cuda_major()}" for name in ("cudart", "cublasLt", "cublas"))
    cuda = (*own, "libcurand.so.10", "libcudnn.so.9")
    return cuda if kind is DeviceKind.CUDA else (*cuda, "libnvinfer.so.10", "libnvonnxparser.so.10")


def _cuda_major() -> str:
    return str(ort.cuda_version or "13").partition(".")[0]


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise DeviceError(
            "cannot load libcuda.so.1: NVIDIA's driver is not installed, or not given to this container"
        ) from None
    _ask(driver, "cuInit", ctypes.c_uint(0))
    return driver


def _ask(driver: ctypes.CDLL, function: str, *arguments: object) -> None:
    status = int(getattr(driver, function)(*arguments))
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
        raise DeviceError(f"NVIDIA's driver: {function}: {(text.value or b'?').decode()} ({status})")
