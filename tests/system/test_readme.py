"""README.md: what can be run in seconds is run, the rest is checked against what would run it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from export.__main__ import main as export
from export.command import _parser as export_parser
from models import zoo
from rafaga.cli import main as rafaga
from tests import bundles
from tests.deploy.commands import check
from tests.documents import ROOT, blocks, indented
from tests.integration import messages
from tests.integration.serving import Served, serving

README = "README.md"
COMMANDS = [line for line in indented(README) if not line.startswith("transport ")]
QUICK = ["--duration", "0.3", "--warm-up", "0.1"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Small models under the names that the page uses."""
    root = tmp_path_factory.mktemp("repository")
    bundles.publish_classifier(root, "lenet5-mnist")
    bundles.publish_forecaster(root, "lstm-co2")
    bundles.publish_detector(root, "ssd300-vgg16")
    bundles.publish_segmenter(root, "fcn-resnet50")
    bundles.publish_sequence_model(root, "lstm-reber")
    with serving(root) as server:
        yield server


@pytest.fixture
def at_hand(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the page names, and the server's address in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAFAGA_SERVER", served.address)
    (tmp_path / "digit.png").write_bytes(messages.png(messages.random_digits(7)[0, :, :, 0]))
    (tmp_path / "street.jpg").write_bytes(messages.jpeg(messages.random_photo(7, 30, 40)[0]))
    months = [f"{1990 + i // 12}-{i % 12 + 1:02},{315 + i / 10}" for i in range(36)]
    (tmp_path / "co2.csv").write_text("\n".join(["month,ppm", *months]))
    return tmp_path


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(("rafaga", "python"))])
def test_other_programs(command: str) -> None:
    words = shlex.split(command)
    match words[0]:
        case "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case "perf_analyzer":  # the same flags are tested where it is installed
            assert words[words.index("-i") + 1] == "grpc"
        case _:
            check(command)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python")])
def test_python_modules(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The export step takes the arguments, and knows the models. What it does with them has tests of its own."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "export"]
    if words[3:] == ["--list"]:
        assert export(words[3:]) == 0
        assert "lenet5-mnist" in capsys.readouterr().out
    elif words[3] in ("verify", "report"):
        with pytest.raises(SystemExit) as ended:
            export([words[3], "--help"])
        assert ended.value.code == 0
    else:
        assert set(export_parser().parse_args(words[3:]).names) <= set(zoo.catalogue())


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("rafaga")])
def test_rafaga(command: str, at_hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)[1:]
    if words[0] == "serve":
        check(command)
        return
    words = [word.replace("BTBTXS", bundles.ALPHABET) for word in words]  # the small model's symbols
    if "--horizon" in words:
        words[words.index("--horizon") + 1] = str(bundles.HORIZON)
    assert rafaga(words + (QUICK if words[0] == "load" else [])) == 0
    assert capsys.readouterr().out


def test_the_sdk(served: Served, at_hand: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(README, "python")
    text = block.text.replace("localhost:50051", served.address).replace("horizon=12", f"horizon={bundles.HORIZON}")
    names = {"co2_by_month": np.linspace(315, 320, 36), "paths": ["digit.png", "digit.png"]}
    exec(compile(text, README, "exec"), names)
    printed = capsys.readouterr().out
    assert "Classification" in printed
    assert printed.splitlines()[-1].startswith("digit ")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / README).read_text()):
        assert (ROOT / target).exists(), target
