"""Names of devices in the settings: `cpu`, `cuda:1`, `tensorrt`. `server.engines` finds out whether they exist."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

AUTO = "auto"
_PATTERN = re.compile(r"(cpu|(cuda|tensorrt)(:(\d{1,3}))?)")


class DeviceKind(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT = "tensorrt"


class DeviceFallback(StrEnum):
    """What to do when a configured device cannot be used."""

    FAIL = "fail"
    CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """`index` counts the GPUs that the process sees (CUDA_VISIBLE_DEVICES)."""

    kind: DeviceKind
    index: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.gpu else str(self.kind)

    @property
    def gpu(self) -> bool:
        return self.kind is not DeviceKind.CPU

    @property
    def provider(self) -> str:
        """Its execution provider in ONNX Runtime."""
        return _PROVIDERS[self.kind]


CPU = Device(DeviceKind.CPU)
_PROVIDERS = {
    DeviceKind.CPU: "CPUExecutionProvider",
    DeviceKind.CUDA: "CUDAExecutionProvider",
    DeviceKind.TENSORRT: "TensorrtExecutionProvider",
}


def parse(texts: Sequence[str]) -> tuple[Device, ...] | None:
    """Devices of one kind, each once: `cpu`, `cuda`, `cuda:1`, `tensorrt:0`; None for `auto`. Raises ValueError."""
    if tuple(texts) == (AUTO,):
        return None
    found: list[Device] = []
    for text in texts:
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r}: expected auto, cpu, cuda[:N] or tensorrt[:N]")
        device = Device(DeviceKind(match[2] or match[1]), int(match[4] or 0))
        if device in found:
            raise ValueError(f"{device} is listed twice; each device gets one engine")
        found.append(device)
    if not found:
        raise ValueError("expected auto, cpu, cuda[:N] or tensorrt[:N], got nothing")
    if len({device.kind for device in found}) > 1:
        raise ValueError(f"{', '.join(texts)}: expected devices of one kind; their engines share a queue")
    return tuple(found)
