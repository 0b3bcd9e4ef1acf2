"""Which instructions a processor multiplies with."""

from __future__ import annotations

from pathlib import Path

import pytest

from rafaga.bundle import Precision
from rafaga.processor import instruction_set


@pytest.mark.parametrize(("flags", "expected"), [
    ("flags : fpu avx2", ("avx2", "", "avx2")),
    ("flags : avx2 avx512f avx512bw", ("avx512f", "", "avx512bw")),
    ("flags : avx2 avx512f avx512bw avx512_vnni avx512_bf16", ("avx512f", "avx512_bf16", "avx512_vnni")),
    ("flags : avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_int8", ("avx512f", "amx_bf16", "amx_int8")),
    ("Features : fp asimd asimddp bf16", ("asimd", "bf16", "asimddp")),
    ("a machine that lists none", ("", "", "")),
])  # fmt: skip
def test_the_fastest_instructions_count(tmp_path: Path, flags: str, expected: tuple[str, str, str]) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    order = (Precision.FP32, Precision.BF16, Precision.INT8)
    assert tuple(instruction_set(precision, tmp_path / "cpuinfo") for precision in order) == expected


def test_a_system_without_the_list(tmp_path: Path) -> None:
    assert instruction_set(Precision.INT8, tmp_path / "none") == ""
