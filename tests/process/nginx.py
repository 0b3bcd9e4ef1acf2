"""A real nginx (Debian's) with the project's configuration in front of servers of the test."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.integration.serving import PATIENCE_S, eventually, free_port

CONFIGURATION = Path(__file__).parents[2] / "deploy/nginx/rafaga.conf"
_REPLICA = re.compile(r"^ *server (127\.0\.0\.1:50051)\b.*;$", re.MULTILINE)
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


class Nginx:
    def __init__(self, folder: Path, binary: str, replicas: Sequence[str]) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._folder = folder
        self._command = [binary, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
        self._write(replicas)
        paths = "".join(f"{name}_temp_path {folder / name};\n" for name in _TEMPORARY)
        (folder / "nginx.conf").write_text(
            f"daemon off;\npid {folder}/pid;\nworker_processes 1;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{paths}include {folder}/rafaga.conf;\n}}\n"
        )
        self._process = subprocess.Popen(self._command)
        eventually(self._workers, "nginx works")

    def balance(self, replicas: Sequence[str]) -> None:
        """Over these from now on, as an operator does it: a changed file, and a reload."""
        before = self._workers()
        self._write(replicas)
        self._process.send_signal(signal.SIGHUP)
        eventually(lambda: (now := self._workers()) and not now & before, "nginx has reloaded")

    def command(self, *options: str) -> str:
        """What the program says to these options, of this configuration."""
        done = subprocess.run([*self._command, *options], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)

    def _write(self, replicas: Sequence[str]) -> None:
        text = CONFIGURATION.read_text().replace("127.0.0.1:50050", self.address)
        line = _REPLICA.search(text)
        assert line, "the file names one replica"
        lines = "\n".join(line[0].replace(line[1], replica) for replica in replicas)
        (self._folder / "rafaga.conf").write_text(text.replace(line[0], lines))

    def _workers(self) -> set[int]:
        """Those that take new connections."""
        assert self._process.poll() is None, (self._folder / "error.log").read_text()
        found = set()
        for child in psutil.Process(self._process.pid).children():
            with suppress(psutil.NoSuchProcess):
                title = " ".join(child.cmdline())
                if "worker process" in title and "shutting down" not in title:
                    found.add(child.pid)
        return found


@contextmanager
def nginx(folder: Path, replicas: Sequence[str]) -> Iterator[Nginx]:
    """Skips the test without nginx."""
    if (binary := shutil.which("nginx")) is None:
        pytest.skip("nginx (Debian: nginx) is not installed")
    folder.mkdir()
    running = Nginx(folder, binary, replicas)
    try:
        yield running
    finally:
        running.close()
