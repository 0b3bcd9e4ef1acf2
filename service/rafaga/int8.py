"""int8 on x86 processors with and without VNNI: the same answers everywhere.

VNNI adds four products of uint8 and int8 to a 32-bit sum in one instruction. Without it, ONNX Runtime adds pairs of
products in 16 bits, where they saturate: MobileNetV2 loses 7 points of top-1 and ShuffleNetV2 11. The session option
`session.x64quantprecision` prevents that. On processors with VNNI it costs speed and changes no answer, so it is set
only where sums would saturate.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from rafaga.processor import CPUINFO, features

_EXACT_SUMS = ("session.x64quantprecision", "1")
_X86 = frozenset({"x86_64", "amd64", "i686", "i386"})
_INT8_INSTRUCTIONS = frozenset({"avx512_vnni", "avx_vnni", "asimddp"})  # the last is Arm's
# An ONNX model of one node, c = MatMulInteger(a, b): uint8 [m, k] times int8 [k, n] gives int32 [m, n].
_PROBE = (
    b'\x08\x05:b\n\x18\n\x01a\n\x01b\x12\x01c"\rMatMulInteger\x12\x01pZ\x15\n\x01a\x12\x10\n\x0e\x08\x02\x12\n'
    b"\n\x03\x12\x01m\n\x03\x12\x01kZ\x15\n\x01b\x12\x10\n\x0e\x08\x03\x12\n\n\x03\x12\x01k\n\x03\x12\x01n"
    b"b\x15\n\x01c\x12\x10\n\x0e\x08\x06\x12\n\n\x03\x12\x01m\n\x03\x12\x01nB\x04\n\x00\x10\n"
)


def configure(options: ort.SessionOptions) -> None:
    """Makes CPU sessions with these options add int8 products exactly. Call it for every session."""
    if _x86() and not quick():
        options.add_session_config_entry(*_EXACT_SUMS)


@cache
def quick(cpuinfo: Path = CPUINFO) -> bool:
    """Whether this processor has an instruction for sums of int8 products.

    Where the operating system does not list the processor's instructions, ONNX Runtime is tried on x86, and other
    processors are assumed to have one.
    """
    if listed := features(cpuinfo):
        return bool(_INT8_INSTRUCTIONS & listed)
    return not _x86() or not saturates(ort.InferenceSession(_PROBE, providers=["CPUExecutionProvider"]))


def saturates(session: ort.InferenceSession) -> bool:
    """Whether a session that multiplies integer matrices (see _PROBE) saturates on the largest products."""
    a, b = np.full((16, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    return not np.array_equal(session.run(None, {"a": a, "b": b})[0], a.astype(np.int32) @ b.astype(np.int32))


def _x86() -> bool:
    return platform.machine().lower() in _X86
