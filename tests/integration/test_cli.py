"""Commands against a real server: tensors to plain ONNX files, answers drawn on images, the load shown live."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from rafaga.cli import main
from tests import bundles, plain
from tests.integration import messages
from tests.integration.serving import Served, serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """double (y = 2 x, rows of 3), words (any text), sum (a + b, no free size), detector, segmenter."""
    root = tmp_path_factory.mktemp("cli")
    plain.publish(root, "double", plain.scaled(2))
    plain.publish(root, "words", plain.identity("string", ("batch", 2)))
    plain.publish(root, "sum", plain.model("(int64[2,2] a, int64[2,2] b) => (int64[2,2] sum) { sum = Add(a, b) }"))
    bundles.publish_detector(root)
    bundles.publish_segmenter(root)
    with serving(root) as served:
        yield served


@pytest.fixture(autouse=True)
def address(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAFAGA_SERVER", served.address)


class TestInfer:
    @pytest.mark.parametrize(
        ("arguments", "outputs"),
        [
            (["double", "--input", "x=1,2.5,3"], {"y": [[2, 5, 6]]}),
            (["double", "--input", "1,2,3,4,5,6"], {"y": [[2, 4, 6], [8, 10, 12]]}),
            (["double", "--input", "x=[[1,2,3]]"], {"y": [[2, 4, 6]]}),
            (["sum", "--input", "a=1,2,3,4", "--input", "b=[[1,1],[1,1]]"], {"sum": [[2, 3], [4, 5]]}),
            (["words", "--input", "x=año,b"], {"y": [["año", "b"]]}),
            (["words", "--input", 'x=[["a,b","c"],["d","e"]]'], {"y": [["a,b", "c"], ["d", "e"]]}),
        ],
    )
    def test_values_on_the_command_line(
        self, arguments: list[str], outputs: dict[str, object], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["infer", *arguments, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["model"], answer["version"]) == (arguments[0], 1)
        assert {name: output["data"] for name, output in answer["outputs"].items()} == outputs

    def test_files(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """float64 becomes the model's float32, and a single row a batch of one."""
        np.save(tmp_path / "x.npy", np.array([1.0, 2.0, 3.0]))
        output = tmp_path / "out.npz"
        assert main(["infer", "double", "--input", f"x=@{tmp_path}/x.npy", "--output", str(output)]) == 0
        assert capsys.readouterr().out.splitlines() == ["y float32[1,3]", "[[2., 4., 6.]]"]
        with np.load(output) as found:
            np.testing.assert_array_equal(found["y"], np.array([[2, 4, 6]], np.float32))

    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            (["double", "--input", "1,2"], 4, "expected input x of shape [N, 3], got 2 values"),
            (["double", "--input", "x=[[1,2]]"], 4, "expected input x of shape [N, 3], got [1, 2]"),
            (["double", "--input", "y=1,2,3"], 2, "no input 'y'"),
            (["double", "--input", "x=1,2,3", "--input", "x=1,2,3"], 2, "given more than once"),
            (["double", "--input", "x=one"], 2, "'one' is not a list of values"),
            (["double", "--input", "x=@absent.npy"], 2, "absent.npy: No such file or directory"),
            (["double", "--input", "x=@photo.jpg"], 2, "expected a .npy file"),
            (["sum", "--input", "1,2,3,4"], 2, "NAME=VALUES or NAME=@FILE for a int64[2,2], b int64[2,2]"),
            (["sum", "--input", "a=1,2,3,4.5", "--input", "b=1,2,3,4"], 4, "values that it cannot hold"),
            (["duble", "--input", "x=1"], 4, "did you mean 'double'?"),
        ],
    )
    def test_what_does_not_fit(
        self, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["infer", *arguments]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line

    def test_the_catalogue_says_how_to_ask(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["models", "double"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "  input         x float32[?,3]" in lines
        assert "  task          none: ask with rafaga infer" in lines


def test_answers_are_drawn_on_the_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The box of the only object is the whole image, and so is the class. Into a file, and into a folder."""
    grey = (204, 204, 204)
    photo, folder = tmp_path / "photo.png", tmp_path / "drawn"
    photo.write_bytes(messages.png(np.full((40, 80, 3), grey, np.uint8)))
    folder.mkdir()
    assert main(["detect", str(photo), "--draw", str(tmp_path / "box.png")]) == 0
    capsys.readouterr()
    assert main(["segment", str(photo), "--draw", str(folder), "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["drawn"] == str(folder / "photo.png")
    for path in (tmp_path / "box.png", folder / "photo.png"):
        with Image.open(path) as drawn:
            assert drawn.size == (80, 40)
            assert drawn.getpixel((79, 39)) != grey


class TestTop:
    def test_once(self, served: Served, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["top", served.http, "--once", "--interval", "0.05"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        assert lines[0] == f"{served.http}/metrics"
        headings, *rows = [line.split() for line in lines if line][3:]
        assert headings == ["MODEL", "READY", "REQ/S", "MEAN", "MS", "QUEUE", "MS", "BATCH", "QUEUED", "ERRORS/S"]
        assert {row[0] for row in rows} == {"double", "words", "sum", "detector", "segmenter"}

    def test_json(self, served: Served, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["top", f"127.0.0.1:{served.server.http_port}", "--json", "--interval", "0.05"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [model["versions"] for model in found["models"]] == [[1]] * 5

    def test_live(self, served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """Two measurements, then Ctrl-C."""
        monkeypatch.setattr(time, "sleep", Mock(side_effect=[None, None, KeyboardInterrupt]))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert main(["top", served.http]) == 0
        shown = capsys.readouterr().out
        assert (shown[:8], shown[-8:]) == ("\x1b[?1049h", "\x1b[?1049l")
        assert shown.count("cores busy") == 2

    def test_no_server_and_not_its_http_port(self, served: Served, capsys: pytest.CaptureFixture[str]) -> None:
        for address, said in (
            ("127.0.0.1:1", "No server at http://127.0.0.1:1/metrics (connection refused). Start one: rafaga serve\n"),
            (served.address, f"http://{served.address}/metrics: "),
        ):
            assert main(["top", address, "--once", "--interval", "0.05"]) == 3
            (line,) = capsys.readouterr().err.splitlines(keepends=True)
            assert line.startswith(f"rafaga: {said}")
