"""The servers that are measured, as processes of their own: ours and Triton. A server without requests costs nothing.

Triton is not part of this project. RAFAGA_PEERS names a folder with two scripts:

    triton_peer.sh GRPC_PORT NAME=model.onnx[:MAX_BATCH]…    Triton in the foreground, HTTP on GRPC_PORT - 1, metrics on
                                                             GRPC_PORT + 1; THREADS sets ONNX Runtime's threads
    perf_analyzer.sh ARGUMENTS…                              Triton's load generator
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from demo.server import ServerProcess

_START_S = 300.0  # VGG-16 warms up every batch size; the first start of Triton installs it
_MAX_BATCH = 32
_IDLE_CORES, _LOOK_EVERY_S, _SETTLE_S = 0.1, 0.5, 300.0


@dataclass(frozen=True)
class Target:
    """A server of the Open Inference Protocol with Triton's metrics. ca: certificate to trust, where it uses TLS."""

    address: str
    metrics_url: str
    pid: int
    ca: Path | None = None

    def cpu_s(self) -> float:
        """CPU seconds of the process and its children."""
        process, used = psutil.Process(self.pid), 0.0
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                used += sum(each.cpu_times()[:2])
        return used

    def answered(self, model: str) -> int:
        """Requests answered since the start."""
        tls = None if self.ca is None else ssl.create_default_context(cafile=self.ca)
        with urllib.request.urlopen(self.metrics_url, timeout=10, context=tls) as reply:
            text = reply.read().decode()
        found = re.findall(rf'^nv_inference_request_success{{[^}}]*model="{model}"[^}}]*}} (\S+)', text, re.M)
        return round(sum(map(float, found)))

    def settle(self) -> None:
        """Waits until a backlog is computed, since it would slow down the next measurement.

        Raises RuntimeError after five minutes.
        """
        end, before = time.monotonic() + _SETTLE_S, self.cpu_s()
        while time.monotonic() < end:
            time.sleep(_LOOK_EVERY_S)
            now = self.cpu_s()
            if now - before < _IDLE_CORES * _LOOK_EVERY_S:
                return
            before = now
        raise RuntimeError(f"process {self.pid} still computes {_SETTLE_S:g} s after the load ended")


@contextmanager
def rafaga(
    repository: Path, names: Sequence[str], *options: str, tls: bool = False, checkout: Path | None = None
) -> Iterator[Target]:
    """Serves the models `names` of a repository. checkout: of this project, whose code is run instead of this one."""
    # Beside the repository, because hard links do not cross file systems.
    with tempfile.TemporaryDirectory(dir=repository.parent) as name:
        folder = Path(name)
        for model in names:
            shutil.copytree(repository / model, folder / "models" / model, copy_function=os.link)
        ca = None
        if tls:
            ca = _certificate(folder)
            options = (*options, "--tls-certificate", str(ca), "--tls-key", str(folder / "key.pem"))
        environment = {"PYTHONPATH": str(checkout.resolve() / "service")} if checkout else {}
        server = ServerProcess(
            (folder / "models").resolve(), folder / "log", ["--triton-metrics", "true", *options], _START_S, environment
        )
        try:
            server.start()
            url = server.metrics_url if ca is None else server.metrics_url.replace("http:", "https:")
            yield Target(server.address, url, server.pid, ca)
        except Exception:
            print(server.last_log_lines())
            raise
        finally:
            server.kill()


def _certificate(folder: Path) -> Path:
    """Self-signed, for 127.0.0.1; its key is key.pem."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "certificate.pem", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "certificate.pem"


def peer_script(name: str) -> Path | None:
    """A script of RAFAGA_PEERS, if it is set."""
    folder = os.environ.get("RAFAGA_PEERS")
    return Path(folder) / name if folder else None


@contextmanager
def triton(script: Path, files: Mapping[str, Path], threads: int) -> Iterator[Target]:
    """Serves ONNX files by model name."""
    with tempfile.TemporaryFile() as log, ExitStack() as stack:
        port = _free_ports()
        models = [f"{name}={file}:{_MAX_BATCH}" for name, file in files.items()]
        process = subprocess.Popen(
            ["bash", str(script), str(port), *models],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"THREADS": str(threads)},
            start_new_session=True,
        )
        stack.callback(_end, process)
        _wait(process, lambda: _ready(f"http://127.0.0.1:{port - 1}/v2/health/ready"))
        if process.poll() is not None:
            log.seek(0)
            raise RuntimeError(f"Triton did not start:\n{log.read().decode(errors='replace')[-2000:]}")
        yield Target(f"127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}/metrics", process.pid)


def _wait(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    end = time.monotonic() + _START_S
    while process.poll() is None and not ready():
        if time.monotonic() > end:
            raise RuntimeError(f"Triton did not start within {_START_S:g} s")
        time.sleep(0.2)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _free_ports() -> int:
    """A free port whose neighbours are free too."""
    while True:
        with ExitStack() as stack, suppress(OSError, OverflowError):
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = int(first.getsockname()[1])
            for neighbour in (port - 1, port + 1):
                stack.enter_context(socket.create_server(("127.0.0.1", neighbour)))
            return port
