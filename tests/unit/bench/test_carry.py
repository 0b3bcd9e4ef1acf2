"""Files in pieces: what comes together is what was sent, or it does not come together."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.carry import SUMS, CarryError, join, main, split


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    wheel = tmp_path / "big-1.0-py3-none-any.whl"
    wheel.write_bytes(os.urandom(2500))
    return wheel


@pytest.mark.parametrize(("size", "pieces"), [(1000, 3), (2500, 1), (1250, 2), (10_000, 1)])
def test_there_and_back(wheel: Path, tmp_path: Path, size: int, pieces: int) -> None:
    made = split(wheel, tmp_path / "pieces", size)
    assert len(made) == pieces
    assert all(piece.stat().st_size <= size for piece in made)
    whole = join(tmp_path / "pieces")
    assert (whole.name, whole.read_bytes()) == (wheel.name, wheel.read_bytes())
    assert join(tmp_path / "pieces").read_bytes() == wheel.read_bytes(), "and again"


def test_a_piece_that_did_not_come_is_named(wheel: Path, tmp_path: Path) -> None:
    _, second, _ = split(wheel, tmp_path / "pieces", 1000)
    second.unlink()
    with pytest.raises(CarryError, match=f"lacks {second.name}"):
        join(tmp_path / "pieces")


def test_so_is_one_that_changed(wheel: Path, tmp_path: Path) -> None:
    *_, last = split(wheel, tmp_path / "pieces", 1000)
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(CarryError, match=f"{last.name} changed on the way"):
        join(tmp_path / "pieces")
    assert not (tmp_path / "pieces" / wheel.name).exists()


def test_pieces_in_another_order_are_another_file(wheel: Path, tmp_path: Path) -> None:
    split(wheel, tmp_path / "pieces", 1000)
    sums = tmp_path / "pieces" / SUMS
    first, second, *others = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join((second, first, *others)))
    with pytest.raises(CarryError, match="do not make"):
        join(tmp_path / "pieces")
    assert sorted(path.suffix for path in (tmp_path / "pieces").iterdir()) == ["", ".000", ".001", ".002"]


@pytest.mark.parametrize("text", ["", "rubbish\n", "0" * 64 + "  ../elsewhere\n"])
def test_sums_that_are_none(wheel: Path, tmp_path: Path, text: str) -> None:
    split(wheel, tmp_path / "pieces", 1000)
    (tmp_path / "pieces" / SUMS).write_text(text)
    with pytest.raises(CarryError, match="expected a SHA-256"):
        join(tmp_path / "pieces")


def test_a_folder_in_use_is_left_alone(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", str(wheel), str(tmp_path)]) == 1
    assert "expected an empty folder" in capsys.readouterr().err
    assert main(["join", str(tmp_path / "nowhere")]) == 1
    assert f"{SUMS}: No such file" in capsys.readouterr().err


def test_joining_needs_nothing_but_python(wheel: Path, tmp_path: Path) -> None:
    """It comes before anything else is installed."""
    split(wheel, tmp_path / "pieces", 1000)
    isolated = [sys.executable, "-I", "-S", str(Path("bench/carry.py").resolve()), "join", str(tmp_path / "pieces")]
    done = subprocess.run(isolated, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).read_bytes() == wheel.read_bytes()


def test_sha256sum_agrees(wheel: Path, tmp_path: Path) -> None:
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("needs sha256sum")
    split(wheel, tmp_path / "pieces", 1000)
    join(tmp_path / "pieces")
    subprocess.run([tool, "-c", SUMS], cwd=tmp_path / "pieces", check=True, capture_output=True)
