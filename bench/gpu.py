"""`python -m bench.gpu`: raw and served throughput of five models on a GPU, in less than eight minutes, as one table.

    prepare (anywhere: needs the exporter)  →  build/gpu-bench, small enough to be carried  →  run (needs the GPU)

Every way of measuring is a process of its own with an end: what takes too long is left out of the table and said to be.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnxruntime as ort

from bench.gpu_models import WORKLOADS, Workload, pack, unpack
from bench.gpu_raw import Figure
from demo.server import ServerProcess
from rafaga.bundle import Precision
from rafaga.errors import DeviceError
from rafaga.server import devices
from rafaga.server.devices import Device, DeviceKind, Nvidia

_WHOLE_S = 460.0  # below eight minutes, with what it takes to end
_LOAD_WARM_UP_S = 0.5


@dataclass(frozen=True)
class Settings:
    device: str = "cuda:0"
    models: tuple[Workload, ...] = WORKLOADS
    rows: tuple[int, ...] = (1, 8, 32, 128)
    max_batch_size: int = 128
    seconds: float = 0.6
    load_s: float = 3.0
    processes: int = 6
    concurrency: int = 24
    whole_s: float = _WHOLE_S
    request_rows: int | None = None  # None: each workload's own


# A rehearsal on the CPU: everything runs, and no figure means anything.
_REHEARSAL: dict[str, Any] = {
    "rows": (1, 2),
    "max_batch_size": 2,
    "seconds": 0.2,
    "load_s": 1.0,
    "processes": 1,
    "concurrency": 2,
    "request_rows": 1,
}


@dataclass(frozen=True)
class Served:
    """rate: rows per second. p99 of a lone caller's requests, and of independent ones at four fifths of the peak."""

    model: str
    precision: str
    rate: float
    mean_rows: float
    alone_p99_ms: float
    loaded_p99_ms: float | None


@dataclass
class Results:
    raw: list[Figure] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


class Clock:
    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("step", nargs="?", choices=("run", "prepare"), default="run")
    parser.add_argument("--device", default="cuda:0", help="cuda[:N], or cpu for a rehearsal (default: cuda:0)")
    parser.add_argument("--models", nargs="+", choices=[w.name for w in WORKLOADS], help="default: all")
    parser.add_argument("--packed", type=Path, default=Path("build/gpu-bench"))
    parser.add_argument("--output", type=Path, help="file to write the table to, beside printing it")
    parser.add_argument("--seconds", type=float, default=_WHOLE_S, help="for everything (default: %(default)s)")
    options = parser.parse_args()
    models = tuple(w for w in WORKLOADS if not options.models or w.name in options.models)
    if options.step == "prepare":
        for workload in models:
            if not (options.packed / workload.name / "program.pt2").exists():
                pack(workload, options.packed / workload.name)
        return 0
    try:
        (device,) = devices.parse([options.device]) or ()
        devices.check(device, Nvidia())
    except (DeviceError, ValueError) as error:
        print(f"bench.gpu: no GPU to measure: {error}", file=sys.stderr)
        return 1
    missing = [w.name for w in models if not (options.packed / w.name / "program.pt2").exists()]
    if missing:
        print(f"bench.gpu: {options.packed} lacks {', '.join(missing)}: python -m bench.gpu prepare", file=sys.stderr)
        return 1
    settings = Settings(options.device, models, whole_s=options.seconds, **({} if device.gpu else _REHEARSAL))
    text = report(settings, measure(settings, options.packed), device)
    print(f"\n{text}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
    return 0


def measure(settings: Settings, packed: Path) -> Results:
    """The most telling first; what finds no time any more is named in `left_out`."""
    clock, results = Clock(settings.whole_s), Results()
    with tempfile.TemporaryDirectory() as name:
        folders: dict[Precision, list[Path]] = {}
        for workload in settings.models:
            for precision in workload.precisions:
                _say(f"unpacking {workload.name} {precision}")
                repository = Path(name) / precision
                folder = unpack(packed / workload.name, repository, precision, settings.max_batch_size)
                folders.setdefault(precision, []).append(folder)
        every = [folder for some in folders.values() for folder in some]
        tensorrt = Nvidia().missing_libraries(DeviceKind.TENSORRT)
        steps: list[tuple[str, Callable[[], None]]] = [
            ("onnxruntime", lambda: _raw("onnxruntime", every, packed, settings, clock, results)),
            *(
                (f"served {precision}", lambda p=precision: _served(p, Path(name), settings, clock, results))
                for precision in folders
            ),
            ("torch-eager", lambda: _raw("torch-eager", every, packed, settings, clock, results)),
        ]
        if settings.device != "cpu":
            if tensorrt:
                results.left_out.append(f"TensorRT: cannot load {', '.join(tensorrt)}")
            else:
                steps.append(("tensorrt", lambda: _raw("tensorrt", every, packed, settings, clock, results)))
            # It compiles anew for every size.
            one = replace(settings, rows=settings.rows[-1:])
            steps.append(("torch-compile", lambda: _raw("torch-compile", every, packed, one, clock, results)))
        for what, step in steps:
            if clock.left_s < 10:
                results.left_out.append(f"{what}: no time was left")
                continue
            _say(f"{what}, {clock.left_s:.0f} s left")
            try:
                step()
            except Exception as error:  # the other ways are still worth having
                results.left_out.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
    return results


def _raw(way: str, folders: list[Path], packed: Path, settings: Settings, clock: Clock, results: Results) -> None:
    command = [sys.executable, "-m", "bench.gpu_raw", way, "--device", settings.device, "--packed", str(packed)]
    command += ["--seconds", str(settings.seconds), "--rows", *map(str, settings.rows), "--", *map(str, folders)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        printed, said = process.communicate(timeout=clock.left_s)
    except subprocess.TimeoutExpired:
        process.kill()
        printed, said = process.communicate()
        results.left_out.append(f"{way}: some models, because the time was up")
    figures = [Figure(**json.loads(line)) for line in printed.splitlines() if line.startswith("{")]
    results.raw += figures
    results.left_out += [line for line in said.splitlines() if line.startswith(way)]
    if process.returncode not in (0, -9):
        results.left_out.append(f"{way}: exit code {process.returncode}: {said[-300:]}")


def _served(precision: Precision, root: Path, settings: Settings, clock: Clock, results: Results) -> None:
    with _server(root / precision, root / f"{precision}.log", settings, clock) as server:
        for workload in settings.models:
            if precision not in workload.precisions:
                continue
            if clock.left_s < 4 * settings.load_s:
                results.left_out.append(f"served {workload.name} {precision}: no time was left")
                continue
            _say(f"served {workload.name} {precision}")
            try:
                results.served.append(_loaded(server, workload, precision, settings, results))
            except Exception as error:  # the other models are still worth having
                results.left_out.append(f"served {workload.name} {precision}: {str(error)[-300:]}")


def _loaded(
    server: ServerProcess, workload: Workload, precision: Precision, settings: Settings, results: Results
) -> Served:
    one = ["--processes", "1", "--concurrency", "1"]
    rows = settings.request_rows or workload.rows
    alone = _load(server, workload, rows, [*one, "--duration", str(settings.load_s / 2)])
    callers = ["--processes", str(settings.processes), "--concurrency", str(settings.concurrency)]
    peak = _load(server, workload, rows, [*callers, "--duration", str(settings.load_s)])
    if not peak["answered"]:
        raise RuntimeError(f"{workload.name} {precision}: none of the requests was answered in time")
    rate = 0.8 * peak["answered"]
    some = ["--processes", str(settings.processes), "--rate", str(rate), "--duration", str(settings.load_s)]
    loaded = _load(server, workload, rows, some)
    wrong = sum(figures["wrong"] for figures in (alone, peak, loaded))
    if wrong:
        results.left_out.append(f"served {workload.name} {precision}: {wrong} answers were not those of a lone request")
    return Served(
        workload.name,
        str(precision),
        peak["answered"] * rows,
        peak["mean_batch_size"],
        alone["latency"]["p99_ms"],
        loaded["latency"]["p99_ms"] if not loaded["failed"] else None,
    )


def _load(server: ServerProcess, workload: Workload, rows: int, options: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        command = [sys.executable, "-m", "rafaga.cli", "load", "--server", server.address, "--model", workload.name]
        command += [
            "--deadline-ms",
            "30000",
            "--rows",
            str(rows),
            "--warm-up",
            str(_LOAD_WARM_UP_S),
            "--json",
            str(file),
            *options,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if not file.exists():
            raise RuntimeError(f"rafaga load: {done.stdout[-500:]}{done.stderr[-500:]}")
        figures: dict[str, Any] = json.loads(file.read_text())["steps"][0]["figures"]
        return figures


@contextmanager
def _server(repository: Path, log: Path, settings: Settings, clock: Clock) -> Iterator[ServerProcess]:
    options = ["--device", settings.device, "--max-batch-size", str(settings.max_batch_size)]
    options += ["--max-queue-wait-ms", "10000", "--max-request-bytes", str(64 * 2**20)]
    server = ServerProcess(repository, log, options, start_timeout_s=max(60.0, clock.left_s / 2))
    try:
        server.start()
        yield server
        server.stop()
    except Exception:
        print(server.last_log_lines(), file=sys.stderr)
        raise
    finally:
        server.kill()


def report(settings: Settings, results: Results, device: Device) -> str:
    """A table for docs/benchmarks.md."""
    name = Nvidia().gpus()[device.index].name if device.gpu else f"REHEARSAL on the CPU of a {platform.machine()}"
    lines = [
        f"## On a GPU: {name}\n",
        f"onnxruntime {ort.__version__}, Python {platform.python_version()}. Rows (images, series) per second, in "
        f"brackets at the best batch size of {', '.join(map(str, settings.rows))}; raw batches lie on the device "
        "already, served ones come over gRPC from this machine.\n",
        "| model | | ONNX Runtime | p99 ms | torch eager | torch.compile | TensorRT | served | ÷ raw | rows per batch "
        "| p99 alone | p99 at 80 % |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(w.name, str(precision), results) for w in settings.models for precision in w.precisions]
    lines += ["", *(f"- not measured: {what}" for what in dict.fromkeys(results.left_out))]
    return "\n".join(lines) + "\n"


def _line(model: str, precision: str, results: Results) -> str:
    def best(way: str) -> Figure | None:
        figures = [f for f in results.raw if (f.way, f.model, f.precision) == (way, model, precision)]
        return max(figures, key=lambda f: f.rows_per_s, default=None)

    def rate(way: str) -> str:
        figure = best(way)
        return "–" if figure is None else f"{figure.rows_per_s:,.0f} ({figure.rows})"

    raw = best("onnxruntime")
    served = next((s for s in results.served if (s.model, s.precision) == (model, precision)), None)
    own = f"{rate('onnxruntime')}{' ' + raw.note if raw and raw.note else ''}"
    cells = [model, precision, own, f"{raw.p99_ms:.2f}" if raw else "–"]
    cells += [rate("torch-eager"), rate("torch-compile"), rate("tensorrt")]
    if served is None:
        cells += ["–"] * 5
    else:
        loaded = "–" if served.loaded_p99_ms is None else f"{served.loaded_p99_ms:.2f}"
        ratio = f"{served.rate / raw.rows_per_s:.2f}" if raw else "–"
        cells += [f"{served.rate:,.0f}", ratio, f"{served.mean_rows:.0f}", f"{served.alone_p99_ms:.2f}", loaded]
    return f"| {' | '.join(cells)} |"


def _say(text: str) -> None:
    print(f"bench.gpu: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
