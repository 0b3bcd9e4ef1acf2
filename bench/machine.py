"""What kind of machine this is: enough to compare figures by, nothing that names it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import grpc
import onnxruntime

from rafaga.server.engines.cpu_count import available_cores

_TELLING = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


def describe() -> str:
    """One sentence of Markdown."""
    model, flags = "unknown processor", ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        if found := re.search(r"model name\s*:\s*(.+)", text):
            model = found[1]
        if found := re.search(r"flags\s*:\s*(.+)", text):
            have = set(found[1].split())
            flags = ", " + " ".join(f for f in _TELLING if f in have)
    return (
        f"{available_cores()} cores ({model}{flags}), no GPU used, "
        f"Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}, grpcio {grpc.__version__}."
    )
