"""Which devices models run on, and what is missing when a configured device cannot be used.

Importing this needs no GPU. NVIDIA's driver is queried through its own library, which exists wherever a GPU can be
used.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from rafaga.errors import DeviceError
from rafaga.server.config.device import CPU, Device, DeviceFallback, DeviceKind

# ONNX Runtime uses it if it is installed.
_PLUGINS = "libnvinfer_plugin.so.10"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_BLOCKING_SYNC = 4  # cudaDeviceScheduleBlockingSync: threads that wait for the GPU sleep, and do not spin


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it."""

    index: int
    name: str
    capability: tuple[int, int]


class Nvidia:
    """This machine, as `choose` examines it. Tests bring simulated ones."""

    def gpus(self) -> tuple[Gpu, ...]:
        """At least one. Raises DeviceError when there is no usable driver."""
        driver = _driver()
        count = ctypes.c_int()
        _ask(driver, "cuDeviceGetCount", ctypes.byref(count))
        if not count.value:
            raise DeviceError("NVIDIA's driver is installed, but shows this process no GPU")
        return tuple(_gpu(driver, index) for index in range(count.value))

    def missing_libraries(self, kind: DeviceKind) -> tuple[str, ...]:
        """Shared libraries that `kind` needs and that cannot be loaded."""
        preload()
        return tuple(name for name in needed_libraries(kind) if not _loads(name))

    def providers(self) -> Sequence[str]:
        """What ONNX Runtime was built with."""
        return tuple(ort.get_available_providers())

    def start(self, index: int) -> None:
        """Initialises CUDA on that GPU. Raises DeviceError when it is too old, busy, full or broken, or its driver is
        too old."""
        cudart = ctypes.CDLL(f"libcudart.so.{_cuda_major_version()}")
        cudart.cudaGetErrorString.restype = ctypes.c_char_p
        steps = (("cudaSetDevice", index), ("cudaSetDeviceFlags", _BLOCKING_SYNC), ("cudaFree", None))
        for function, argument in steps:
            if status := getattr(cudart, function)(argument):
                reason = cudart.cudaGetErrorString(status).decode()
                raise DeviceError(f"cuda:{index}: {function}: {reason} ({status})")


@dataclass(frozen=True)
class DeviceChoice:
    """Where models run, one engine per device; `why` is for the log. `degraded`: something better was not usable."""

    devices: tuple[Device, ...]
    why: str
    degraded: bool = False


def choose(wanted: tuple[Device, ...] | None, fallback: DeviceFallback, system: Nvidia) -> DeviceChoice:
    """Raises DeviceError when a device in `wanted` cannot be used and `fallback` does not allow the CPU. `wanted` None:
    the first GPU if it can be used, else the CPU."""
    if wanted is None:
        try:
            found = system.gpus()[0].name
        except DeviceError as error:
            return DeviceChoice((CPU,), f"auto: {error}")
        device = Device(DeviceKind.CUDA)
        try:
            check(device, system)
        except DeviceError as error:
            return DeviceChoice((CPU,), f"auto: there is {found}, but {error}", degraded=True)
        return DeviceChoice((device,), f"auto: found {found}")
    try:
        for device in wanted:
            check(device, system)
    except DeviceError as error:
        if fallback is DeviceFallback.FAIL:
            raise
        return DeviceChoice((CPU,), f"fallen back to the CPU, as device_fallback allows: {error}", degraded=True)
    return DeviceChoice(wanted, "as configured")


def check(device: Device, system: Nvidia) -> None:
    """Starts CUDA, if `device` is a GPU. Raises DeviceError that says why it cannot be used, and what to do."""
    if not device.gpu:
        return
    if device.provider not in system.providers():
        raise DeviceError(
            f"{device}: this ONNX Runtime was built without {device.provider}; install onnxruntime-gpu in its place"
        )
    gpus = system.gpus()
    if device.index >= len(gpus):
        raise DeviceError(f"{device}: expected a GPU below {len(gpus)}, which is how many this process sees")
    if missing := system.missing_libraries(device.kind):
        of_tensorrt = [name for name in missing if name.startswith("libnv")]
        packages = ["'rafaga[gpu]'"] if len(of_tensorrt) < len(missing) else []
        packages += [f"'tensorrt-cu{_cuda_major_version()}-libs<11'"] if of_tensorrt else []
        what, how = ", ".join(missing), " ".join(packages)
        raise DeviceError(f"{device}: cannot load {what}: pip install {how}, or put them on LD_LIBRARY_PATH")
    system.start(device.index)


def preload() -> None:
    """Loads the libraries of CUDA and TensorRT from this environment's packages, where the system does not look.

    Without this, a session on the GPU silently becomes one on the CPU. ONNX Runtime only looks in its own site-packages
    folder, and the libraries may lie in another.
    """
    # It prints what it does not find.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(OSError):
        ort.preload_dlls()
    folders = [
        folder for path in map(Path, sys.path) for folder in (*path.glob("nvidia/*/lib"), path / "tensorrt_libs")
    ]
    # cuDNN loads the compiler by name for some kernels.
    compiler = f"libnvrtc.so.{_cuda_major_version()}"
    for name in (*needed_libraries(DeviceKind.TENSORRT), compiler, _PLUGINS):
        if not _loads(name):
            # Once one is loaded, other libraries find it by its name.
            any(_loads(str(folder / name)) for folder in folders if (folder / name).is_file())


def needed_libraries(kind: DeviceKind) -> tuple[str, ...]:
    """Libraries of a GPU besides the driver's, dependencies first."""
    own = tuple(f"lib{name}.so.{_cuda_major_version()}" for name in ("cudart", "cublasLt", "cublas"))
    cuda = (*own, "libcurand.so.10", "libcudnn.so.9")
    return cuda if kind is DeviceKind.CUDA else (*cuda, "libnvinfer.so.10", "libnvonnxparser.so.10")


def _cuda_major_version() -> str:
    """Of the CUDA that ONNX Runtime was built with."""
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
        raise DeviceError("no NVIDIA driver (libcuda.so.1)") from None
    _ask(driver, "cuInit", ctypes.c_uint(0))
    return driver


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    _ask(driver, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    _ask(driver, "cuDeviceGetName", name, ctypes.c_int(len(name)), device)
    _ask(driver, "cuDeviceGetAttribute", ctypes.byref(major), ctypes.c_int(_CAPABILITY_MAJOR), device)
    _ask(driver, "cuDeviceGetAttribute", ctypes.byref(minor), ctypes.c_int(_CAPABILITY_MINOR), device)
    return Gpu(index, name.value.decode(), (major.value, minor.value))


def _ask(driver: ctypes.CDLL, function: str, *arguments: object) -> None:
    status = int(getattr(driver, function)(*arguments))
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(ctypes.c_int(status), ctypes.byref(text))
        raise DeviceError(f"NVIDIA's driver: {function}: {(text.value or b'?').decode()} ({status})")
