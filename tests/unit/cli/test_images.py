"""Commands that take images: which files they read, what they print, what they write."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rafaga.cli._errors import ExitCode, UsageError
from rafaga.cli._images import expand
from tests.unit.cli.conftest import Rafaga
from tests.unit.client.fake_server import BROKEN, Script


def test_several_images_are_one_table_and_one_shows_its_timing(
    script: Script, images: list[str], rafaga: Rafaga
) -> None:
    ran = rafaga("classify", *images, "--model", "lenet5-mnist", "--top-k", "2")
    assert (ran.code, ran.err) == (ExitCode.OK, "")
    assert ran.rows == [
        ["FILE", "RANK", "LABEL", "INDEX", "PROBABILITY"],
        [images[0], "1", "7", "7", "0.5500"],
        ["2", "8", "8", "0.0500"],
        [images[1], "1", "3", "3", "0.5500"],
        ["2", "4", "4", "0.0500"],
        [],
        ["lenet5-mnist", "v1", "fp32:", "2", "images"],
    ]
    ran = rafaga("classify", images[0], "--top-k", "1")
    assert [row[0] for row in ran.rows[:2]] == ["RANK", "1"]
    timing = "lenet5-mnist v1 fp32: queued 10 µs, prepared 20 µs, ran 30 µs in a batch of 4"
    assert ran.out.splitlines()[3] == timing


def test_a_bad_file_fails_alone(script: Script, images: list[str], rafaga: Rafaga) -> None:
    broken = Path(images[0]).with_name("broken.png")
    broken.write_bytes(BROKEN)
    ran = rafaga("classify", images[0], str(broken), "--model", "lenet5-mnist")
    assert (ran.code, ran.err) == (ExitCode.INVALID, f"rafaga: {broken}: broken\n")
    ran = rafaga("classify", "absent.png", images[1], "--model", "lenet5-mnist", "--json")
    assert (ran.code, ran.err) == (ExitCode.USAGE, "rafaga: absent.png: No such file or directory\n")
    missing, found = json.loads(ran.out)
    assert missing["error"]["reason"] == "FILE"
    assert found["predictions"][0] == {"label": "3", "index": 3, "probability": pytest.approx(0.55)}
    assert found["timing"]["batch_size"] == 4


def test_features(script: Script, images: list[str], tmp_path: Path, rafaga: Rafaga) -> None:
    output = tmp_path / "maps.npz"
    ran = rafaga("features", images[0], "--output", str(output))
    assert ran.rows[1] == ["c4", "16", "2", "x", "3", "x", "3"]
    assert (ran.code, ran.err) == (0, "rafaga: backbone has random weights: its answers are meaningless\n")
    with np.load(output) as maps:
        assert {name: maps[name].shape for name in maps} == {"c4": (2, 3, 3), "embedding": (4,)}
    first, second = json.loads(rafaga("features", *images, "--output", str(tmp_path), "--json").out)
    assert first["maps"][0] == {"name": "c4", "stride": 16, "shape": [2, 3, 3]}
    assert second["output"] == str(tmp_path / "3.npz")
    with np.load(second["output"]) as maps:
        assert list(maps) == ["c4", "embedding"]


def test_one_file_cannot_hold_two_answers(script: Script, images: list[str], tmp_path: Path, rafaga: Rafaga) -> None:
    ran = rafaga("features", *images, "--output", str(tmp_path / "maps.npz"))
    assert (ran.code, "2 images need an existing folder" in ran.err) == (ExitCode.USAGE, True)
    ran = rafaga("features", images[0], images[0], "--output", str(tmp_path))
    assert (ran.code, "two of the images would be written to" in ran.err) == (ExitCode.USAGE, True)
    assert script.requests == []


def test_files_folders_patterns_and_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("deep/er", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("b.png", "a.jpeg", "notes.txt", "deep/er/c.JPG", "odd[1].png"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"encoded")))
    for words, names in (
        (["."], ["a.jpeg", "b.png", "deep/er/c.JPG", "odd[1].png"]),
        (["*.png"], ["b.png", "odd[1].png"]),
        (["**/*.JPG"], ["deep/er/c.JPG"]),
        (["odd[1].png", "absent.png"], ["odd[1].png", "absent.png"]),
    ):
        assert [image.name for image in expand(words)] == names
    assert expand(["-"]) == [("stdin", b"encoded")]
    with pytest.raises(UsageError, match=r"empty: no .bmp, .gif, .jpeg, .jpg, .png, .webp file"):
        expand(["empty"])
    with pytest.raises(UsageError, match=r"\*\.tif: no file matches"):
        expand(["*.tif"])
