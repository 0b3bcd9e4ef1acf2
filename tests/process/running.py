"""`rafaga serve` as a process of its own: started, asked, signalled, and its log read line by line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.integration.serving import PATIENCE_S, Stubs, connected, eventually, metric_of

_FREE_PORTS = {"RAFAGA_GRPC_PORT": "0", "RAFAGA_HTTP_PORT": "0"}
# Not measured, because that differs from run to run.
_FIXED = ("--threads", "1", "--engine", "onnxruntime")


class Line(NamedTuple):
    """One line of the log; `fields` is empty where it is not JSON."""

    text: str
    fields: dict[str, Any]


class Process:
    """On free ports unless told otherwise, until the block ends.

    folder: where it is started; here unless told. environ: more variables. files: how many it may open.
    """

    def __init__(
        self,
        *arguments: str,
        folder: Path | None = None,
        environ: Mapping[str, str] | None = None,
        files: int | None = None,
    ) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAFAGA_")}
        # By a shell: with a preexec_fn, gRPC's handlers of fork would run here.
        limited = () if files is None else ("sh", "-c", f'ulimit -n {files}; exec "$@"', "sh")
        self._process = subprocess.Popen(
            [*limited, sys.executable, "-m", "rafaga", "serve", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env=inherited | _FREE_PORTS | dict(environ or {}),
            cwd=folder,
        )
        self.pid = self._process.pid
        self.log: list[Line] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)

    def wait_for(self, message: str) -> dict[str, Any]:
        """The fields of the first line with this message; fails when the process ends without it."""
        eventually(lambda: self.line(message) or not self._reader.is_alive(), f"{message!r} in the log")
        line = self.line(message)
        assert line is not None, f"ended without {message!r}:\n" + "\n".join(line.text for line in self.log)
        return line.fields

    def line(self, message: str) -> Line | None:
        return next((line for line in self.log if line.fields.get("message") == message), None)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends the signal, unless it has ended; gives the exit code."""
        self.send(number)
        return self.exit_code()

    def exit_code(self) -> int:
        """Waits for the end."""
        code = self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for text in lines:
                try:
                    fields = json.loads(text)
                except json.JSONDecodeError:
                    fields = {}
                self.log.append(Line(text.rstrip("\n"), fields))


class Running(Stubs):
    """A process that serves, and stubs that are connected to it."""

    def __init__(self, process: Process, channel: Any, ports: dict[str, Any]) -> None:
        super().__init__(channel)
        self.process = process
        self.address = f"127.0.0.1:{ports['grpc_port']}"
        self.http = f"http://127.0.0.1:{ports['http_port']}"
        self.admin_port: int | None = ports["admin_port"]

    def metric(self, name: str, **labels: str) -> float:
        return metric_of(self.http, name, **labels)


@contextmanager
def running(repository: Path, *arguments: str, files: int | None = None) -> Iterator[Running]:
    """`rafaga serve`, once it serves."""
    with Process("--repository", str(repository), *_FIXED, *arguments, files=files) as process:
        fields = process.wait_for("serving")
        with connected(f"127.0.0.1:{fields['grpc_port']}") as channel:
            yield Running(process, channel, fields)
