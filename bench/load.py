"""A closed loop of callers: `rafaga load` in processes of its own, its figures read from its JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_WARM_UP_S = 0.5


@dataclass(frozen=True)
class LoadResult:
    """rate: answers per second. p50_ms, p99_ms: latency. batch_size: mean, as a request sees it. client_cpu: cores."""

    rate: float
    p50_ms: float
    p99_ms: float
    batch_size: float
    client_cpu: float


def closed_loop(address: str, model: str, concurrency: int, seconds: float) -> LoadResult:
    """Raises RuntimeError when a request failed or an answer was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        command = [sys.executable, "-m", "rafaga.cli", "load", "--server", address, "--model", model]
        command += ["--concurrency", str(concurrency), "--duration", str(seconds), "--warm-up", str(_WARM_UP_S)]
        done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"rafaga load failed:\n{done.stdout}{done.stderr}")
        figures = json.loads(file.read_text())["steps"][0]["figures"]
    if figures["failed"] or figures["refused"] or figures["wrong"]:
        raise RuntimeError(f"not every request was answered rightly:\n{done.stdout}{done.stderr}")
    latency = figures["latency"]
    return LoadResult(
        rate=figures["answered"],
        p50_ms=latency["p50_ms"],
        p99_ms=latency["p99_ms"],
        batch_size=figures["mean_batch_size"],
        client_cpu=figures["generator_cores"],
    )
