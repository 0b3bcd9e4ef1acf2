"""int8 on processors of different kinds: the same answers everywhere, and where they come fast.

An x86 processor with VNNI adds four products of uint8 and int8 to 32 bits in one instruction. Without it, ONNX Runtime
adds pairs of products in 16 bits and lets them saturate, unless it is told not to: so MobileNetV2 lost 7 points of
top-1 and ShuffleNetV2 11, which the same files do not lose with VNNI.
"""

from __future__ import annotations

from pathlib import Path

EXACT = ("session.x64quantprecision", "1")
"""Configuration of every session that runs a bundle's file on a CPU. It changes nothing where there is VNNI."""

_CPUINFO = Path("/proc/cpuinfo")
_QUICK = frozenset({"avx512_vnni", "avx_vnni", "asimddp"})  # the last is Arm's


def quick(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether this processor has an instruction for sums of int8 products; taken to be so where nobody can tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return True
    features = [line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))]
    return not features or bool(_QUICK & set(features[0].split()))
