"""The processor's instructions for products in each precision, as far as they decide how it rounds."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from rafaga.bundle import Precision

CPUINFO = Path("/proc/cpuinfo")

# By the names of Linux, the fastest first: engines use the first that the processor has. `asimddp` is Arm's.
_INSTRUCTION_SETS = {
    Precision.BF16: ("amx_bf16", "avx512_bf16", "bf16"),
    Precision.INT8: ("amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "avx512bw", "avx2"),
}
_FLOAT = ("avx512f", "avx2", "asimd")


@cache
def features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """All instruction sets that the operating system lists; empty where it lists none."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    listed = [line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))]
    return frozenset(listed[0].split()) if listed else frozenset()


def instruction_set(precision: Precision, cpuinfo: Path = CPUINFO) -> str:
    """The one that multiplies in `precision`; "" where it is unknown, or the processor has none."""
    return next((name for name in _INSTRUCTION_SETS.get(precision, _FLOAT) if name in features(cpuinfo)), "")
