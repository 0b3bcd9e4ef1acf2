"""docs/tutorial.md from its first file to its last command, as a reader goes through it.

1. Files are saved where the page says. 2. Commands are given in its order; the server stays up until the end. 3. What
needs a cluster or a daemon is checked against what it names.
"""

from __future__ import annotations

import runpy
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import yaml

from export.__main__ import main as export
from models.training.__main__ import main as train
from rafaga.cli import main as rafaga
from tests.deploy import commands
from tests.documents import ROOT, blocks
from tests.integration.serving import free_port, get, metric_of
from tests.process.running import Process

TUTORIAL = "docs/tutorial.md"
TRITON = ROOT / ".venv-triton/bin/python"
MODULES = {"export": export, "models.training": train}


class Walk:
    """`said`: what each command printed."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.said: dict[str, str] = {}
        self.grpc, self.http = (f"localhost:{free_port()}" for _ in range(2))
        self._stack = stack

    def save(self, title: str, text: str) -> None:
        path = self.folder / title
        path.parent.mkdir(exist_ok=True)
        path.write_text(self._here(text))

    def give(self, command: str) -> None:
        words = shlex.split(self._here(command))
        if words[:2] == ["rafaga", "serve"]:
            ports = ["--grpc-port", self.grpc.split(":")[1], "--http-port", self.http.split(":")[1]]
            served = self._stack.enter_context(Process(str(self.folder / words[2]), *ports))
            served.wait_for("serving")
        elif words[0] in ("kubectl", "docker"):
            # Without kubectl, which renders what a command applies, the rest of the page is still checked.
            if words[0] == "docker" or shutil.which("kubectl"):
                commands.check(command, self.folder)
        elif words == ["python", "ask_open_inference.py"]:
            pass  # has a test of its own
        else:
            self.said[command] = self.run(words)

    def run(self, words: list[str]) -> str:
        """What the command prints. Python's run in this process: elsewhere, each would import PyTorch anew."""
        if words[0] not in ("python", "rafaga"):
            return subprocess.run(words, cwd=self.folder, stdout=subprocess.PIPE, text=True, check=True).stdout
        printed = StringIO()
        with chdir(self.folder), pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
            patch.setenv("RAFAGA_SERVER", self.grpc)
            patch.syspath_prepend(self.folder)
            match words:
                case ["rafaga", *arguments]:
                    code = rafaga(arguments)
                case ["python", "-m", module, *arguments]:
                    code = MODULES[module](arguments)
                case _:
                    runpy.run_path(words[1], run_name="__main__")
                    code = 0
        assert code == 0, f"{shlex.join(words)}\n{printed.getvalue()}"
        return printed.getvalue()

    def _here(self, text: str) -> str:
        return text.replace("localhost:50051", self.grpc).replace("localhost:8080", self.http)


@contextmanager
def walking(folder: Path, page: str = TUTORIAL, kind: type[Walk] = Walk) -> Iterator[Walk]:
    with ExitStack() as stack:
        walk = kind(folder, stack)
        shutil.copytree(ROOT / "deploy", folder / "deploy")
        for name in ("pyproject.toml", "README.md", "LICENSE", "requirements", "service", "models", "export"):
            (folder / name).symlink_to(ROOT / name)
        for block in blocks(page):
            if block.language == "text":
                continue  # what a command prints
            if block.title:
                walk.save(block.title, block.text)
            else:
                assert block.language == "sh"
                for line in block.lines:
                    walk.give(line)
        yield walk


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    with walking(tmp_path_factory.mktemp("tutorial")) as walked:
        yield walked


def said(walk: Walk, start: str) -> str:
    (answer,) = (text for command, text in walk.said.items() if command.startswith(start))
    return answer


def test_the_model_is_exported_served_and_right(walk: Walk) -> None:
    assert "shapes" in said(walk, "python -m export verify")
    assert any("<svg" in page.read_text() or "<img" in page.read_text() for page in walk.folder.rglob("*.html"))
    assert "shapes" in said(walk, "rafaga models")
    _, best, *_ = said(walk, "rafaga classify").splitlines()
    assert best.split()[:2] == ["1", "circle"]
    triangle, *others = said(walk, "python ask.py").splitlines()
    assert triangle.startswith("triangle")
    assert [line.split(" → ") for line in others] == [[label] * 2 for label in ("circle", "square", "triangle")]


def test_an_open_inference_client_gets_the_same(walk: Walk) -> None:
    if not TRITON.exists():
        pytest.skip("no .venv-triton: `make .venv-triton` installs Triton's client")
    answer = walk.run([str(TRITON), "ask_open_inference.py"])
    assert '"image"' in answer
    probabilities = [float(word) for word in answer.splitlines()[-1].strip("[] ").split()]
    assert probabilities.index(max(probabilities)) == 1, "a square"


def test_it_was_watched_and_loaded(walk: Walk) -> None:
    assert "rafaga_requests_total" in said(walk, "curl -s http://localhost:8080/metrics")
    assert get(f"http://{walk.http}/readyz")[0] == 200
    assert metric_of(f"http://{walk.http}", "rafaga_batch_size_sum", model="shapes") > 200
    assert "<svg" in (walk.folder / "load.html").read_text()


def test_the_jobs_arguments_are_those_of_the_export_before(walk: Walk) -> None:
    """The same command in the cluster, but for where the result goes."""
    (patch,) = yaml.safe_load((walk.folder / "shapes-job/kustomization.yaml").read_text())["patches"]
    (operation,) = yaml.safe_load(patch["patch"])
    (command,) = (c for c in walk.said if c.startswith("python -m export --factory"))
    given = shlex.split(command)[3:]
    expected = {f"{a}={b}" for a, b in zip(given[::2], given[1::2], strict=True)} | {"--output=/models"}
    assert set(operation["value"]) == expected
