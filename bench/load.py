"""`rafaga load` in processes of its own, its figures read from its JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WARM_UP_S = 0.5


@dataclass(frozen=True)
class LoadResult:
    """rate: answers per second. p50_ms, p99_ms: latency. queue_p50_ms, inference_p50_ms: as the replies tell."""

    rate: float
    p50_ms: float
    p99_ms: float
    queue_p50_ms: float
    inference_p50_ms: float


def closed_loop(address: str, model: str, concurrency: int, seconds: float, protocol: str = "rafaga") -> LoadResult:
    """Raises RuntimeError when a request failed or an answer was wrong."""
    figures = _load(address, model, seconds, "--concurrency", str(concurrency), "--protocol", protocol)
    if figures["failed"] or figures["refused"] or figures["wrong"]:
        raise RuntimeError(f"not every request was answered rightly: {figures}")
    return _result(figures)


def open_loop(address: str, model: str, rate: float, seconds: float, deadline_ms: float) -> LoadResult:
    """Poisson arrivals at `rate`; answers after the deadline are none. Raises RuntimeError when an answer was wrong."""
    options = ["--rate", f"{rate:.1f}", "--deadline-ms", str(deadline_ms), "--protocol", "open-inference"]
    figures = _load(address, model, seconds, *options)
    if figures["wrong"]:
        raise RuntimeError(f"wrong answers: {figures}")
    return _result(figures)


def _load(address: str, model: str, seconds: float, *options: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        command = [sys.executable, "-m", "rafaga.cli", "load", "--server", address, "--model", model, *options]
        command += ["--duration", str(seconds), "--warm-up", str(_WARM_UP_S), "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not file.is_file():
            raise RuntimeError(f"rafaga load failed:\n{done.stdout}{done.stderr}")
        figures: dict[str, Any] = json.loads(file.read_text())["steps"][0]["figures"]
    return figures


def _result(figures: dict[str, Any]) -> LoadResult:
    latency = figures["latency"]
    return LoadResult(
        rate=figures["answered"],
        p50_ms=latency["p50_ms"],
        p99_ms=latency["p99_ms"],
        queue_p50_ms=figures["queue"]["p50_ms"],
        inference_p50_ms=figures["inference"]["p50_ms"],
    )
