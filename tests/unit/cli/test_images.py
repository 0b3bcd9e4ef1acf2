"""Commands that take images: which files they read, what they print, what they write."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rafaga.cli import main
from rafaga.cli._errors import ExitCode, UsageError
from rafaga.cli._images import expand
from tests.unit.client.fake_server import BROKEN, Script


def test_several_images_are_one_table(script: Script, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", *images, "--model", "lenet5-mnist", "--top-k", "2"]) == ExitCode.OK
    captured = capsys.readouterr()
    rows = [line.split() for line in captured.out.splitlines()]
    assert rows == [
        ["FILE", "RANK", "LABEL", "INDEX", "PROBABILITY"],
        [images[0], "1", "7", "7", "0.5500"],
        ["2", "8", "8", "0.0500"],
        [images[1], "1", "3", "3", "0.5500"],
        ["2", "4", "4", "0.0500"],
        [],
        ["lenet5-mnist", "v1", "fp32:", "2", "images"],
    ]
    assert captured.err == ""


def test_one_image_needs_no_name_and_shows_its_timing(
    script: Script, images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", images[0], "--top-k", "1"]) == ExitCode.OK
    heading, row, _, footer = capsys.readouterr().out.splitlines()
    assert (heading.split()[0], row.split()) == ("RANK", ["1", "7", "7", "0.5500"])
    assert footer == "lenet5-mnist v1 fp32: queued 10 µs, prepared 20 µs, ran 30 µs in a batch of 4"


def test_a_bad_file_fails_alone(script: Script, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    broken = Path(images[0]).with_name("broken.png")
    broken.write_bytes(BROKEN)
    assert main(["classify", images[0], str(broken), "--model", "lenet5-mnist"]) == ExitCode.INVALID
    assert capsys.readouterr().err == f"rafaga: {broken}: broken\n"
    assert main(["classify", "absent.png", images[1], "--model", "lenet5-mnist", "--json"]) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.err == "rafaga: absent.png: No such file or directory\n"
    missing, found = json.loads(captured.out)
    assert missing["error"]["reason"] == "FILE"
    assert found["predictions"][0] == {"label": "3", "index": 3, "probability": pytest.approx(0.55)}
    assert found["timing"]["batch_size"] == 4


def test_features(script: Script, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "maps.npz"
    assert main(["features", images[0], "--output", str(output)]) == ExitCode.OK
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split() == ["c4", "16", "2", "x", "3", "x", "3"]
    assert captured.err == "rafaga: backbone has random weights: its answers are meaningless\n"
    with np.load(output) as maps:
        assert {name: maps[name].shape for name in maps} == {"c4": (2, 3, 3), "embedding": (4,)}
    assert main(["features", *images, "--output", str(tmp_path), "--json"]) == ExitCode.OK
    first, second = json.loads(capsys.readouterr().out)
    assert first["maps"][0] == {"name": "c4", "stride": 16, "shape": [2, 3, 3]}
    assert second["output"] == str(tmp_path / "3.npz")
    with np.load(second["output"]) as maps:
        assert list(maps) == ["c4", "embedding"]


def test_one_file_cannot_hold_two_answers(
    script: Script, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["features", *images, "--output", str(tmp_path / "maps.npz")]) == ExitCode.USAGE
    assert "2 images need an existing folder" in capsys.readouterr().err
    assert main(["features", images[0], images[0], "--output", str(tmp_path)]) == ExitCode.USAGE
    assert "two of the images would be written to" in capsys.readouterr().err
    assert script.requests == []


class TestExpansion:
    def test_files_folders_patterns_and_stdin(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "deep/er").mkdir(parents=True)
        for name in ("b.png", "a.jpeg", "notes.txt", "deep/er/c.JPG", "odd[1].png"):
            (tmp_path / name).write_bytes(b"x")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"encoded")))
        assert [image.name for image in expand(["."])] == ["a.jpeg", "b.png", "deep/er/c.JPG", "odd[1].png"]
        assert [image.name for image in expand(["*.png"])] == ["b.png", "odd[1].png"]
        assert [image.name for image in expand(["**/*.JPG"])] == ["deep/er/c.JPG"]
        assert [image.name for image in expand(["odd[1].png", "absent.png"])] == ["odd[1].png", "absent.png"]
        assert expand(["-"]) == [("stdin", b"encoded")]

    @pytest.mark.parametrize("word", ["empty", "*.tif"])
    def test_nothing_there(self, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            UsageError, match=r"empty: no .bmp, .gif, .jpeg, .jpg, .png, .webp file|\*\.tif: no file matches"
        ):
            expand([word])
