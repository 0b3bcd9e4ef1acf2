"""A real Triton beside the server, and its perf_analyzer as the client of both.

They are not part of this project: RAFAGA_PEERS names a folder with two scripts,

    triton_peer.sh GRPC_PORT NAME=model.onnx[:MAX_BATCH]…    Triton in the foreground, metrics on GRPC_PORT + 1;
                                                             the environment's THREADS are ONNX Runtime's
    perf_analyzer.sh ARGUMENTS…                              Triton's load generator

Without them the tables lack Triton's rows, and say so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cores import Cores, cpu_s, on
from bench.records import Sample

ENVIRONMENT = "RAFAGA_PEERS"
_START_TIMEOUT_S = 300.0  # the first start installs it
_MAX_BATCH = 32
# The first run installs it. Offered more than is answered it goes on until its memory is full.
_ANALYZER_TIMEOUT_S = 300.0
# Otherwise six of its threads share one, and HTTP/2's flow control is measured with the server.
_OWN_CONNECTIONS = {"TRITON_CLIENT_GRPC_CHANNEL_MAX_SHARE_COUNT": "1"}
_REPORTED = (
    r"Throughput: ([\d.]+)",
    r"p50 latency: (\d+) usec",
    r"p99 latency: (\d+) usec",
    r"([\d.]+)% of the requests were delayed",
)


@dataclass(frozen=True)
class Target:
    """A server of the Open Inference Protocol with Triton's metrics."""

    address: str
    metrics_url: str
    pid: int


def peers() -> Path | None:
    folder = os.environ.get(ENVIRONMENT, "")
    return Path(folder) if folder and (Path(folder) / "triton_peer.sh").is_file() else None


@contextmanager
def triton(folder: Path, models: Mapping[str, Path], threads: int, log: Path) -> Iterator[Target]:
    """Serves the ONNX files of `models`."""
    port = _free_ports()
    command = ["bash", str(folder / "triton_peer.sh"), str(port)]
    command += [f"{name}={path}:{_MAX_BATCH}" for name, path in models.items()]
    environment = {**os.environ, "THREADS": str(threads)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    target = Target(f"127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}/metrics", process.pid)
    try:
        end = time.monotonic() + _START_TIMEOUT_S
        while not _ready(port - 1):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"Triton did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield target
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def backend(target: Target, model: str) -> str:
    """A sentence on what runs `model` on a Triton, as it tells itself."""
    host, port = target.address.rsplit(":", 1)
    server, config = (_json(f"http://{host}:{int(port) - 1}/v2{path}") for path in ("", f"/models/{model}/config"))
    return f"Triton {server['version']} runs `{model}` in its {config['backend'] or config['platform']} backend."


CLIENT = (
    "perf_analyzer has a connection for each caller, and 16 for more callers than that; in the open loop it has 8. "
    "Its closed loops warm up with one caller less, in windows that are not counted."
)
"""What belongs beside its figures."""


def closed(callers: int) -> tuple[str, ...]:
    """perf_analyzer's closed loop. It counts while it still connects: one caller less is the warm-up, in windows of its
    own, and takes as long."""
    return ("--concurrency-range", f"{callers - 1}:{callers}:1" if callers > 1 else "1")


def poisson(rate: float) -> tuple[str, ...]:
    """perf_analyzer's open loop, with the same arrivals every time: requests per second."""
    return ("--request-rate-range", f"{rate:.0f}", "--request-distribution", "poisson", "--max-threads", "8")


def analyze(folder: Path, target: Target, model: str, load: Sequence[str], window_s: float, cores: Cores) -> Sample:
    """perf_analyzer under `load`: the mean of three windows, percentiles of all three together.

    Raises RuntimeError when requests failed, subprocess.TimeoutExpired where answers do not end.
    """
    answered, used_s = counted(target, "nv_inference_request_success", model), cpu_s(target.pid)
    command = ["bash", str(folder / "perf_analyzer.sh"), "-m", model, "-u", target.address, "-i", "grpc", "-a", *load]
    # However much the windows differ: the blocks show how steady the machine is.
    command += ["-p", str(round(window_s * 1000)), "--max-trials", "3", "-s", "100000"]
    start_s, client_s = time.monotonic(), _children_cpu_s()
    with on(cores.client):
        done = subprocess.run(
            command,
            env=os.environ | _OWN_CONNECTIONS,
            capture_output=True,
            text=True,
            check=False,
            timeout=_ANALYZER_TIMEOUT_S,
        )
    client_cores = (_children_cpu_s() - client_s) / (time.monotonic() - start_s)
    if done.returncode:
        raise RuntimeError(f"perf_analyzer failed:\n{done.stdout}{done.stderr}")
    requests = counted(target, "nv_inference_request_success", model) - answered
    return dataclasses.replace(
        reported(done.stdout),
        server_cpu_us=1e6 * (cpu_s(target.pid) - used_s) / requests,
        client_cores=client_cores,
        answered=requests,
    )


def reported(text: str) -> Sample:
    """What perf_analyzer printed of the last load. Raises RuntimeError where figures lack."""
    _, _, last = text.rpartition("Client:")
    rate, p50, p99, late = (re.search(pattern, last) for pattern in _REPORTED)
    if rate is None or p50 is None or p99 is None:
        raise RuntimeError(f"perf_analyzer told no figures:\n{text}")
    return Sample(
        rate=float(rate[1]),
        p50_ms=int(p50[1]) / 1e3,
        p99_ms=int(p99[1]) / 1e3,
        late=float(late[1]) / 100 if late is not None else 0.0,
    )


def counted(target: Target, name: str, model: str) -> int:
    """What the server's counter `name` says of all versions of `model`."""
    with urllib.request.urlopen(target.metrics_url, timeout=10) as reply:
        text = reply.read().decode()
    found = re.findall(rf'^{name}{{[^}}]*model="{re.escape(model)}"[^}}]*}} (\S+)', text, re.M)
    return round(sum(map(float, found)))


def _children_cpu_s() -> float:
    """Of those that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return json.load(reply)


def _ready(http_port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/v2/health/ready", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _free_ports() -> int:
    """A port between two others that are free."""
    while True:
        sockets: Sequence[socket.socket] = ()
        try:
            first = socket.create_server(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            sockets = [first]
            sockets = [first, *(socket.create_server(("127.0.0.1", p)) for p in (port - 1, port + 1))]
            return port
        except (OSError, OverflowError):
            continue
        finally:
            for s in sockets:
                s.close()
