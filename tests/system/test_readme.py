"""README.md and the guides: what takes seconds is run as it stands, the rest is checked against what would run it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.__main__ import main as export
from export.command import _parser as export_parser
from models import zoo
from models.training.data import load_co2
from rafaga.cli import main as rafaga
from tests import bundles
from tests.deploy.commands import check
from tests.documents import ROOT, blocks, commands, same_output, transcript
from tests.integration.serving import Served, serving

README = "README.md"
GUIDES = ("docs/client.md", "docs/http.md", "docs/models.md", "docs/from-torchserve.md", "docs/from-triton.md")
COMMANDS = sorted({command for document in (README, *GUIDES) for command in commands(document)})
SHIPPED = ROOT / "service/rafaga/demo/models"
QUICK = {
    "backtest": ["--origins", "3"],
    "load": ["--duration", "0.3", "--warm-up", "0.1"],
    "top": ["--interval", "0.1"],
}


def of(*programs: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(programs)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The models of `rafaga demo`, and small models under the other names that the pages use."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(SHIPPED, root, dirs_exist_ok=True)
    bundles.publish_detector(root, "ssd300-vgg16")
    bundles.publish_segmenter(root, "fcn-resnet50")
    bundles.publish_sequence_model(root, "lstm-reber")
    with serving(root) as server:
        yield server


@pytest.fixture
def here(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the examples, and the server's address in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAFAGA_SERVER", served.address)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def run(command: str, served: Served, capsys: pytest.CaptureFixture[str]) -> str:
    """What it prints. Other addresses, the small model's symbols, less time; otherwise as it stands."""
    command = command.replace("localhost:8080", served.http).replace("BTBTXS", bundles.ALPHABET)
    program, *words = shlex.split(command, comments=True)
    if program == "curl":
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        return subprocess.run(["curl", "-sS", "--fail", *words], check=True, capture_output=True, text=True).stdout
    assert program == "rafaga"
    address = [served.http] if words[0] == "top" else []
    assert rafaga([*words, *address, *QUICK.get(words[0], [])]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", of("rafaga", "curl"))
def test_requests(command: str, served: Served, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if command.startswith(("rafaga serve", "rafaga demo")):  # started in tests/process
        check(command.split(" #")[0])
    else:
        assert run(command, served, capsys)


@pytest.mark.parametrize("document", [README, "docs/client.md"])
def test_commands_and_the_sdk_print_what_the_page_shows(
    document: str, served: Served, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, printed in transcript(document):
        found = run(command, served, capsys)
        assert same_output(found, printed), found
    for block in blocks(document, "python"):
        text = block.text.replace("localhost:50051", served.address).replace("BTBTXS", bundles.ALPHABET)
        exec(compile(text, document, "exec"), {})
    found = capsys.readouterr().out
    for shown in blocks(document, "text"):
        assert same_output(found, shown.text), found


@pytest.mark.parametrize("command", of("python"))
def test_python_modules(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They take the arguments, and know the models. What they do with them has tests of its own."""
    module, *words = shlex.split(command, comments=True)[2:]
    if module == "export" and words == ["--list"]:
        assert export(words) == 0
        assert "lenet5-mnist" in capsys.readouterr().out
    elif module == "export" and words[0] in ("verify", "report"):
        with pytest.raises(SystemExit, match="0"):
            export([words[0], "--help"])
    elif module == "export":
        assert set(export_parser().parse_args(words).names) <= set(zoo.catalogue())
    else:
        assert find_spec(module) is not None


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - set(of("rafaga", "curl", "python"))))
def test_other_programs(command: str) -> None:
    words = shlex.split(command, comments=True)
    match words[0]:
        case "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert words[2].removeprefix(".[").removesuffix("]") in extras
        case "perf_analyzer":  # the same flags are tested where it is installed
            assert words[words.index("-i") + 1] in ("grpc", "http")
        case _:
            assert words[0] == "kubectl"
            check(command.split(" #")[0])


@pytest.mark.parametrize("document", [README, *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))])
def test_files_that_a_page_names_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert ((ROOT / document).parent / target).exists(), target
    for name in re.findall(r"\bexamples/[\w/.-]*\w", text):
        assert (ROOT / name).exists(), name


def test_the_examples_are_what_their_page_says() -> None:
    months, *rows = (ROOT / "examples/co2.csv").read_text().splitlines()
    assert months == "month,ppm"
    assert [row.split(",")[0] for row in (rows[0], rows[-1])] == ["1958-03", "2001-12"]
    np.testing.assert_allclose([float(row.split(",")[1]) for row in rows], load_co2(), atol=0.0051)
    for digit in range(10):
        with Image.open(ROOT / f"examples/digits/{digit}.png") as image:
            assert (image.size, image.mode) == ((28, 28), "L")
    assert sum(path.stat().st_size for path in (ROOT / "examples").rglob("*")) < 150_000
