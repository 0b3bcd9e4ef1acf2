"""The same answers of int8 files on every processor, and which processors are quick with them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from export.verify import open_session
from rafaga import int8
from rafaga.server.engines.onnxruntime import create_session
from tests import plain


def convolution() -> onnx.ModelProto:
    """y = sum(x * w) / 10,000 for 64 weights of 127, quantised as export does: two products of the largest numbers add
    up to twice what 16 bits hold."""
    return plain.model(
        """(uint8[n,64,1,1] x) => (uint8[n,1,1,1] y)
        <float one = {1}, uint8 zero = {0}, int8 weights_zero = {0}, float unit = {10000}> {
            x_float = DequantizeLinear(x, one, zero)
            weights_float = DequantizeLinear(weights, one, weights_zero)
            sum = Conv(x_float, weights_float)
            y = QuantizeLinear(sum, unit, zero)
        }""",
        weights=np.full((1, 64, 1, 1), 127, np.int8),
    )


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What is known of this processor is kept for the process."""
    int8.quick.cache_clear()
    yield
    int8.quick.cache_clear()


class Saturating:
    """A session of a processor without VNNI, not configured."""

    def run(self, names: None, feed: dict[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        products = feed["a"].astype(np.int32)[:, :, None] * feed["b"].astype(np.int32)[None]
        pairs = np.minimum(products[:, 0::2] + products[:, 1::2], 2**15 - 1)
        return [pairs.sum(axis=1, dtype=np.int32)]


def test_sums_do_not_saturate(tmp_path: Path) -> None:
    """In the server, and in what export measures with."""
    onnx.save(convolution(), tmp_path / "model.onnx")
    largest = np.full((3, 64, 1, 1), 255, np.uint8)
    expected = round(64 * 255 * 127 / 10_000)
    for session in (create_session((tmp_path / "model.onnx").read_bytes(), 1), open_session(tmp_path / "model.onnx")):
        assert session.run(None, {"x": largest})[0].ravel().tolist() == [expected] * 3


@pytest.mark.parametrize(("machine", "quick", "set_"), [
    ("x86_64", True, False),
    ("AMD64", False, True),
    ("aarch64", False, False),
])  # fmt: skip
def test_only_x86_without_vnni_pays_for_exact_sums(
    monkeypatch: pytest.MonkeyPatch, machine: str, quick: bool, set_: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(int8, "quick", lambda: quick)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "0")
    int8.configure(options)
    assert options.get_session_config_entry("session.x64quantprecision") == ("1" if set_ else "0")


# Where the system lists no instructions, x86 is tried.
UNLISTED = (("x86_64", True, False), ("x86_64", False, True), ("arm64", True, True))


@pytest.mark.parametrize(
    ("text", "machine", "saturates", "quick"),
    [
        ("flags : fpu avx2 avx512f avx512_vnni", "", True, True),
        ("flags : fpu avx2 avx_vnni", "", True, True),
        ("flags : fpu avx2 avx512f\nprocessor : 1\nflags : fpu avx2 avx512f", "", False, False),
        ("Features : fp asimd asimddp", "", True, True),
        ("Features : fp asimd", "", False, False),
        *(("a machine that lists no instructions", *case) for case in UNLISTED),
        *((None, *case) for case in UNLISTED),
    ],
)
def test_which_processors_are_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, machine: str, saturates: bool, quick: bool
) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{text}\n")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(int8, "saturates", lambda _: saturates)
    assert int8.quick(tmp_path / "cpuinfo") == quick


def test_the_try_finds_saturation() -> None:
    assert int8.saturates(cast(ort.InferenceSession, Saturating()))
    if int8.quick():
        assert not int8.saturates(ort.InferenceSession(int8._PROBE, providers=["CPUExecutionProvider"]))
