"""Golden answers: what passes, and what is refused."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafaga import bundle as bundles
from rafaga.bundle import Bundle
from rafaga.errors import BundleError
from rafaga.server.engines.batched import Completed, SessionEngine
from rafaga.server.engines.contract import PendingOutputs
from rafaga.server.repository import golden as golden_answers
from rafaga.server.repository.golden import Golden
from rafaga.server.scheduling.job import Part
from tests.bundles import publish_classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_classifier(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return bundles.load(folder)


@pytest.fixture(scope="module")
def golden(folder: Path, bundle: Bundle) -> Golden:
    return Golden.load(bundle, folder / bundles.GOLDEN)


def test_an_engine_that_answers_from_stale_buffers_is_found(golden: Golden) -> None:
    class Stale(SessionEngine):
        def __init__(self) -> None:
            """No session."""

        def submit(self, rows: Sequence[Part]) -> PendingOutputs:
            return Completed(golden.outputs)

    with pytest.raises(BundleError, match="golden outputs differ"):
        golden.verify(Stale(), 1e-3, max_rows=100)


@pytest.mark.parametrize("wrong", ["value", "nan", "shape"])
def test_answers_are_compared(golden: Golden, wrong: str) -> None:
    (outputs,) = golden.outputs
    golden.check((np.add(outputs, np.float32(5e-4)),), 1e-3)
    changed = outputs[:, :5] if wrong == "shape" else outputs.copy()
    if wrong != "shape":
        changed[0, 0] = np.nan if wrong == "nan" else outputs[0, 0] + 0.01
    with pytest.raises(BundleError, match="golden outputs"):
        golden.check((changed,), 1e-3)


def test_a_missing_output_is_named(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"lacks 'output\.probabilities'"):
        Golden(bundle, {"input.image": np.zeros((1, 28, 28, 1), np.uint8)})


def test_pickles_are_not_opened(tmp_path: Path, bundle: Bundle) -> None:
    np.savez(tmp_path / "evil.npz", **{"input.image": np.array([object()], dtype=object)}, allow_pickle=True)
    with pytest.raises(BundleError, match="expected uint8, got object"):
        Golden.load(bundle, tmp_path / "evil.npz")


def archive(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(f"{name}.npy", content)
    return path


def array(shape: tuple[int, ...], content: bytes = b"", dtype: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is_unpacked(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = archive(tmp_path / "bomb.npz", **{"input.image": array((2**13, 784), bytes(2**13 * 784))})
    assert bomb.stat().st_size < 10_000
    monkeypatch.setattr(golden_answers, "_MOST_BYTES", 2**20)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(BundleError, match="expected at most 1048576 bytes of arrays, got 6422528"):
        Golden.load(bundle, bomb)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (array((2**40,)), "does not fit its size"),
        (array((-1, 3), b"abc"), "does not fit its size"),
        (array((3,), b"abcd"), "does not fit its size"),
        (array((1,), b"abcd", "<f4"), "expected uint8, got float32"),
        (b"no array", "cannot be read"),
    ],
)
def test_an_array_that_is_not_what_the_bundle_says(
    tmp_path: Path, bundle: Bundle, content: bytes, message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        Golden.load(bundle, archive(tmp_path / "evil.npz", **{"input.image": content}))


@given(st.data())
def test_a_damaged_archive_is_read_or_refused(folder: Path, bundle: Bundle, data: st.DataObject) -> None:
    content = bytearray((folder / bundles.GOLDEN).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(BundleError):
        Golden.load(bundle, io.BytesIO(content[: data.draw(st.integers(0, len(content)))]))
