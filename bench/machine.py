"""What figures depend on: the processor, its instructions, the versions. Nothing that names the machine."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rafaga.server.engines.cpu_count import available_cores

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "grpcio", "numpy")


def facts() -> dict[str, Any]:
    text = cpuinfo.read_text() if (cpuinfo := Path("/proc/cpuinfo")).exists() else ""
    model, flags = (re.search(rf"^{key}\s*:\s*(.+)", text, re.M) for key in ("model name", "flags"))
    has = flags[1].split() if flags else []
    return {
        "cpu": model[1] if model else platform.machine(),
        "flags": [flag for flag in _FLAGS if flag in has],
        "cores": available_cores(),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def sentence(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    cpu = f"{facts['cores']} cores of {facts['cpu']} ({' '.join(facts['flags'])})"
    return f"{cpu}, Python {facts['python']}, {versions}, commit {facts['commit'] or 'unknown'}."


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:  # PackageNotFoundError
        return ""


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
