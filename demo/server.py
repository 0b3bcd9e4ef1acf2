"""`rafaga serve` as a separate process, on ports that the system chooses; they are read from the server's log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0


class ServerFailed(Exception):
    """The server did not start, or did not stop in time."""


class ServerProcess:
    """Started by `start`, ended by `stop` (gracefully) or `kill` (at once; no effect if it has ended)."""

    def __init__(
        self,
        repository: Path,
        log: Path,
        options: Sequence[str] = (),
        start_timeout_s: float = _START_TIMEOUT_S,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """environment: added to this process's own."""
        self._repository = repository
        self._options = tuple(options)
        self._start_timeout_s = start_timeout_s
        self._environment = os.environ | (environment or {})
        self.log = log
        self.grpc_port = 0
        self.http_port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "start() comes first"
        return self._process.pid

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}/metrics"

    def start(self) -> None:
        """Returns when the server is serving. Raises ServerFailed."""
        command = [sys.executable, "-m", "rafaga", "serve", "--repository", str(self._repository)]
        command += ["--grpc-port", "0", "--http-port", "0", "--log-format", "json"]
        command += self._options
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        end = time.monotonic() + self._start_timeout_s
        while not self._read_ports():
            if (code := self._process.poll()) is not None:
                raise ServerFailed(f"the server ended with exit code {code} before it served")
            if time.monotonic() > end:
                raise ServerFailed(f"the server did not serve within {self._start_timeout_s:g} s")
            time.sleep(0.05)

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit code. Raises ServerFailed if the process does not end."""
        assert self._process is not None, "start() comes first"
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ServerFailed(f"the server did not stop within {_STOP_TIMEOUT_S:g} s of SIGTERM") from None

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def last_log_lines(self, lines: int = 40) -> str:
        """Empty if there is no log."""
        if not self.log.is_file():
            return ""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def _read_ports(self) -> bool:
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # an incomplete line, or output of a library
                continue
            if isinstance(record, dict) and record.get("message") == "serving":
                self.grpc_port, self.http_port = int(record["grpc_port"]), int(record["http_port"])
                return True
        return False
