"""The load generators, as processes of their own: Triton's perf_analyzer and `rafaga load`."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.blocks import Figures
from bench.servers import Target, peer_script

_TIMEOUT_S = 600.0  # the first run of perf_analyzer installs it
_WARM_UP_S = 1.0
_PATIENT_MS = 60_000
# By default six callers share a connection, and HTTP/2's flow control is measured with the server.
_OWN_CONNECTIONS = {"TRITON_CLIENT_GRPC_CHANNEL_MAX_SHARE_COUNT": "1"}
_REPORTED = {
    "rate": r"Throughput: ([\d.]+)",
    "p50_ms": r"p50 latency: (\d+) usec",
    "p99_ms": r"p99 latency: (\d+) usec",
}


def perf_analyzer(target: Target, model: str, callers: int, seconds: float) -> Figures:
    """A closed loop over the Open Inference Protocol, one row per request.

    perf_analyzer counts while it connects, so it first runs with one caller less. Raises RuntimeError when requests
    fail or RAFAGA_PEERS is not set.
    """
    script = peer_script("perf_analyzer.sh")
    if script is None:
        raise RuntimeError("RAFAGA_PEERS must name the folder that has perf_analyzer.sh")
    command = ["bash", str(script), "-m", model, "-u", target.address, "-i", "grpc", "-a"]
    command += ["--concurrency-range", f"{callers - 1}:{callers}:1" if callers > 1 else "1"]
    # Three windows, however much they differ: the blocks show how steady the machine is.
    command += ["-p", str(round(seconds * 1000 / 3)), "--max-trials", "3", "-s", "100000"]
    if target.ca is not None:
        command += ["--ssl-grpc-use-ssl", "--ssl-grpc-root-certifications-file", str(target.ca)]
    answered, used_s = target.answered(model), target.cpu_s()
    start_s, client_s = time.monotonic(), _children_cpu_s()
    done = subprocess.run(
        command, env=os.environ | _OWN_CONNECTIONS, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
    )
    client_cores = (_children_cpu_s() - client_s) / (time.monotonic() - start_s)
    if done.returncode:
        raise RuntimeError(f"perf_analyzer failed:\n{done.stdout}{done.stderr}")
    cpu_us = 1e6 * (target.cpu_s() - used_s) / (target.answered(model) - answered)
    return reported(done.stdout) | {"server_cpu_us": cpu_us, "client_cores": client_cores}


def reported(text: str) -> Figures:
    """What perf_analyzer printed about its last load. Raises RuntimeError where a figure is missing."""
    last = text.rpartition("Client:")[2]
    found = {name: re.search(pattern, last) for name, pattern in _REPORTED.items()}
    figures = {name: float(match[1]) for name, match in found.items() if match}
    if len(figures) < len(_REPORTED):
        raise RuntimeError(f"perf_analyzer reported no figures:\n{text}")
    return figures | {name: figures[name] / 1e3 for name in ("p50_ms", "p99_ms")}


def rafaga_load(
    target: Target, model: str, seconds: float, *options: object, deadline_ms: float = _PATIENT_MS
) -> Figures:
    """`rafaga load` with `options`, which say how many callers or which rate. A rate counts answers within the
    deadline, latencies count from when a request was due.

    Raises RuntimeError when an answer was wrong, or there is no result.
    """
    answered, used_s = target.answered(model), target.cpu_s()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        command = [sys.executable, "-m", "rafaga", "load", "--server", target.address, "--model", model, "--quiet"]
        command += ["--warm-up", str(_WARM_UP_S), "--duration", str(seconds), "--deadline-ms", str(deadline_ms)]
        command += ["--json", str(file), *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
        if not file.exists():
            raise RuntimeError(f"rafaga load failed:\n{done.stdout}{done.stderr}")
        figures: dict[str, Any] = json.loads(file.read_text())["steps"][0]["figures"]
    if figures["wrong"]:
        raise RuntimeError(f"{figures['wrong']} of {figures['checked']} answers of {model} were wrong")
    target.settle()
    computed = target.answered(model) - answered
    return {
        "rate": figures["answered"],
        "not_answered": figures["refused"] + figures["failed"],
        "mean_ms": figures["latency"]["mean_ms"],
        "p50_ms": figures["latency"]["p50_ms"],
        "p99_ms": figures["latency"]["p99_ms"],
        "queue_p50_ms": figures["queue"]["p50_ms"],
        "run_p50_ms": figures["inference"]["p50_ms"],
        "mean_batch_size": figures["mean_batch_size"],
        "server_cpu_us": 1e6 * (target.cpu_s() - used_s) / computed if computed else 0.0,
        "client_cores": figures["generator_cores"],
    }


def closed_loop(target: Target, model: str, callers: int, seconds: float, *options: object) -> Figures:
    """`rafaga load` with callers that each wait for their answer, of a model whose runs take long.

    The rate is callers / mean latency (Little's law). Answers counted in a window would be one batch more or less: of a
    model that answers 16 images twice a second that is an eighth in four seconds. Raises RuntimeError when a request
    was refused or failed, or none began in the window.
    """
    figures = rafaga_load(target, model, seconds, "--concurrency", callers, *options)
    if figures["not_answered"]:
        raise RuntimeError(f"{figures['not_answered']:.0f} requests to {model} were refused or failed")
    if not figures["mean_ms"]:
        raise RuntimeError(f"{model} is too slow for {callers} callers in {seconds:g} s: give it more --seconds")
    return figures | {"rate": 1e3 * callers / figures["mean_ms"]}


def _children_cpu_s() -> float:
    """Of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
