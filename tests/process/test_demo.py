"""`rafaga demo`: without PyTorch, on free ports, and with commands that work as they are printed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.request import urlopen

import pytest

from rafaga.addresses import GRPC_PORT, HTTP_PORT
from tests.documents import ROOT
from tests.integration.serving import PATIENCE_S

# What `pip install 'rafaga[server]'` does not install. Python imports this module at its start.
HOOK = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "onnx", "onnxscript", "safetensors", "sklearn", "pandas",
                                      "statsmodels", "matplotlib", "rich", "export", "models", "demo", "tests"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
MAIN = "from rafaga.cli import main; raise SystemExit(main())"


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hook")
    (folder / "sitecustomize.py").write_text(HOOK)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAFAGA_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT / 'service'}", "PATH": path, "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def taken() -> Iterator[None]:
    """The usual ports, by this test or already by another program."""
    with ExitStack() as stack:
        for port in (GRPC_PORT, HTTP_PORT):
            with suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
        yield


def test_every_printed_command_works_and_ctrl_c_ends_it(taken: None, environ: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAIN, "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ, cwd=tmp_path) as demo:
        try:
            assert demo.stdout is not None
            printed = list(iter(demo.stdout.readline, "\nCtrl-C stops the server.\n"[1:]))
            assert printed[0] == f"In use, so another port was chosen: {GRPC_PORT}, {HTTP_PORT}\n"
            (page,) = (line.split()[1] for line in printed if line.startswith("  Page "))
            with urlopen(f"{page}v1/models", timeout=PATIENCE_S) as reply:
                assert b"lstm-co2" in reply.read()
            commands = [line.strip() for line in printed[printed.index("Try, in another terminal:\n") + 1 :]]
            curl, classify, forecast = (_answer(line, environ) for line in filter(None, commands))
            assert '"label":"5"' in curl.replace(" ", "")
            assert "5" in classify
            assert "lstm-co2" in forecast
            demo.send_signal(signal.SIGINT)
            assert demo.stdout.read() == "Stopped.\n"
            assert demo.wait(PATIENCE_S) == 0
        finally:
            demo.kill()
    assert not list(tmp_path.iterdir()), "it leaves no files"


def _answer(command: str, environ: dict[str, str]) -> str:
    done = subprocess.run(command, shell=True, env=environ, timeout=PATIENCE_S, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout
