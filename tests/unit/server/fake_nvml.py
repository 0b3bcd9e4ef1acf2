"""NVIDIA's management library as pynvml gives it, with two GPUs of the test's making."""

from __future__ import annotations

from types import SimpleNamespace


class NVMLError(Exception):
    pass


class FakeNvml:
    """The second GPU has no sensor for its power."""

    NVMLError = NVMLError

    def __init__(self, devices: int = 2, driver: bool = True) -> None:
        self._devices = devices
        self._driver = driver

    def nvmlInit(self) -> None:  # noqa: N802
        if not self._driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self._devices

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, device: int) -> str:  # noqa: N802
        return f"GPU of kind {device}"

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=2000, used=500 * (device + 1))

    def nvmlDeviceGetUtilizationRates(self, device: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(gpu=25 * (device + 1))

    def nvmlDeviceGetPowerUsage(self, device: int) -> int:  # noqa: N802
        if device == 1:
            raise NVMLError("Not Supported")
        return 75_500
