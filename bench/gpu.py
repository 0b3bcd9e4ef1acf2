"""`python -m bench.gpu`: raw and served throughput of five models on a GPU, in less than eight minutes, as tables.

    prepare (needs the exporter)  →  build/gpu-bench, small enough to be carried  →  unpack  →  measure  →  report

What is not prepared is prepared first, where the exporter is at hand. Every part is a process of its own with a share
of the time that is left, at whose end it is killed: what it did not come to is left out of the tables and said to be.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bench import page
from bench.gpu_models import WORKLOADS, Workload, is_packed, pack
from bench.gpu_raw import Figure
from bench.gpu_report import Results, Served, report
from bench.packed import unpack
from demo.server import ServerProcess
from rafaga.bundle import Precision
from rafaga.errors import DeviceError
from rafaga.server.config.device import Device, DeviceKind, parse
from rafaga.server.engines import devices
from rafaga.server.engines.devices import Nvidia

_WHOLE_S = 450.0
"""Below eight minutes, with what it takes to start and to end."""
_PREPARING = 0.5
"""Of the whole time, at most."""
_LOAD_WARM_UP_S = 0.5
PART = "gpu"
"""Of docs/benchmarks.md, by the name of its markers."""
_GRPCIO, _NATIVE = "grpcio", "native"


@dataclass(frozen=True)
class Settings:
    device: str = "cuda:0"
    models: tuple[Workload, ...] = WORKLOADS
    rows: tuple[int, ...] = (8, 32, 128)
    max_batch_size: int = 128
    seconds: float = 0.5
    load_s: float = 3.0
    processes: int = 6
    concurrency: int = 24
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


class Clock:
    """Some seconds from now on, and parts of them."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def part(self, share: float) -> Clock:
        """Ends no later than this one."""
        return Clock(self.left_s * min(1.0, share))


class Part(NamedTuple):
    """`weight`: of its time among the parts that are still to come; what one leaves over is the next ones'."""

    name: str
    weight: float
    measure: Callable[[Clock], None]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("step", nargs="?", choices=("run", "prepare"), default="run")
    parser.add_argument("--device", default="cuda:0", help="cuda[:N], or cpu for a rehearsal (default: cuda:0)")
    parser.add_argument("--models", nargs="+", choices=[w.name for w in WORKLOADS], help="default: all")
    parser.add_argument("--packed", type=Path, default=Path("build/gpu-bench"))
    parser.add_argument("--output", type=Path, help="file to write the tables to, beside printing them")
    parser.add_argument("--page", type=Path, help=f"page whose part `{PART}` is filled where there was a GPU")
    parser.add_argument("--seconds", type=float, default=_WHOLE_S, help="for everything (default: %(default)s)")
    options = parser.parse_args()
    models = tuple(w for w in WORKLOADS if not options.models or w.name in options.models)
    if options.step == "prepare":
        for workload in models:
            if not is_packed(workload, options.packed):
                pack(workload, options.packed)
        return 0
    clock = Clock(options.seconds)
    try:
        (device,) = parse([options.device]) or ()
        devices.check(device, Nvidia())
    except (DeviceError, ValueError) as error:
        print(f"bench.gpu: no GPU to measure: {error}", file=sys.stderr)
        return 1
    results = Results()
    prepare(models, options.packed, clock.part(_PREPARING), results)
    there = tuple(w for w in models if is_packed(w, options.packed))
    if not there:
        said = "; ".join(results.left_out)
        print(f"bench.gpu: {options.packed} has nothing to measure: {said}: {_CARRY}", file=sys.stderr)
        return 1
    settings = Settings(options.device, there, **({} if device.gpu else _REHEARSAL))
    measure(settings, options.packed, clock, results)
    text = report(_name(device), models, settings.rows, results)
    print(f"\n{text}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(f"{text}\n")
    if options.page is not None and device.gpu:
        options.page.write_text(page.rendered(options.page.read_text(), {PART: text}))
    return 0


_CARRY = "`make build/gpu-bench` where the exporter is, and carry the folder here"


def prepare(models: Sequence[Workload], packed: Path, clock: Clock, results: Results) -> None:
    """What is not packed yet, in processes of their own, since they need PyTorch's memory."""
    for workload in models:
        if is_packed(workload, packed):
            continue
        _say(f"preparing {workload.name}, {clock.left_s:.0f} s left")
        command = [sys.executable, "-m", "bench.gpu", "prepare", "--packed", str(packed), "--models", workload.name]
        done = _run(command, clock)
        if done.code != 0 or not is_packed(workload, packed):
            results.left_out.append(f"{workload.name}: not prepared: {done.why()}")


def measure(settings: Settings, packed: Path, clock: Clock, results: Results) -> None:
    """The most telling first."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders: dict[Precision, list[Path]] = {}
        for workload in settings.models:
            for precision in workload.precisions:
                if not clock.left_s:
                    results.left_out.append(f"{workload.name} {precision}: no time was left")
                    continue
                _say(f"unpacking {workload.name} {precision}, {clock.left_s:.0f} s left")
                folder = unpack(packed / workload.name, root / precision, precision, settings.max_batch_size)
                folders.setdefault(precision, []).append(folder)
        parts = _parts(settings, packed, root, folders, results)
        for at, part in enumerate(parts):
            _say(f"{part.name}, {clock.left_s:.0f} s left")
            try:
                part.measure(clock.part(part.weight / sum(p.weight for p in parts[at:])))
            except Exception as error:  # the other ways are still worth having
                results.left_out.append(f"{part.name}: {type(error).__name__}: {str(error)[:300]}")


def _parts(
    settings: Settings, packed: Path, root: Path, folders: dict[Precision, list[Path]], results: Results
) -> list[Part]:
    every = [folder for some in folders.values() for folder in some]
    # torch.compile compiles anew for every size.
    largest = replace(settings, rows=settings.rows[-1:])

    def raw(way: str, some: list[Path], weight: float, settings: Settings = settings) -> Part:
        return Part(way, weight, lambda clock: _raw(way, some, packed, settings, clock, results))

    def served(
        models: Sequence[Workload], repository: Path, precision: Precision, transport: str, weight: float
    ) -> Part:
        def measure(clock: Clock) -> None:
            _served(repository, models, precision, transport, settings, clock, results)

        return Part(f"served {precision} {transport}", weight, measure)

    parts = []
    for precision, some in folders.items():
        models = [w for w in settings.models if precision in w.precisions]
        parts += [raw("onnxruntime", some, 2.5), served(models, root / precision, precision, _GRPCIO, 4.0)]
    # The other transport with one model: a server loads and tunes all that it finds.
    model = settings.models[0]
    if importlib.util.find_spec("pygrpc_native") is None:
        results.left_out.append("native transport: not installed")
    else:
        parts.append(served([model], _alone(root, model), model.precisions[0], _NATIVE, 2.0))
    parts.append(raw("torch-eager", every, 1.0))
    if settings.device != "cpu":
        if missing := Nvidia().missing_libraries(DeviceKind.TENSORRT):
            results.left_out.append(f"TensorRT: cannot load {', '.join(missing)}")
        else:
            parts.append(raw("tensorrt", every, 1.0))
        parts.append(raw("torch-compile", every, 1.0, largest))
    return parts


def _alone(root: Path, model: Workload) -> Path:
    """A repository of its first variant and nothing else."""
    repository = root / f"{model.name}-alone"
    repository.mkdir()
    (repository / model.name).symlink_to(root / model.precisions[0] / model.name)
    return repository


def _raw(way: str, folders: list[Path], packed: Path, settings: Settings, clock: Clock, results: Results) -> None:
    command = [sys.executable, "-m", "bench.gpu_raw", way, "--device", settings.device, "--packed", str(packed)]
    command += ["--seconds", str(settings.seconds), "--rows", *map(str, settings.rows), "--", *map(str, folders)]
    done = _run(command, clock)
    results.raw += [Figure(**json.loads(line)) for line in done.printed.splitlines() if line.startswith("{")]
    results.left_out += [line for line in done.said.splitlines() if line.startswith(way)]
    if done.code is None:
        results.left_out.append(f"{way}: some models, because its time was up")
    elif done.code:
        results.left_out.append(f"{way}: {done.why()}")


def _served(
    repository: Path,
    models: Sequence[Workload],
    precision: Precision,
    transport: str,
    settings: Settings,
    clock: Clock,
    results: Results,
) -> None:
    with _server(repository, transport, settings, clock) as server:
        for workload in models:
            what = f"served {workload.name} {precision} {transport}"
            if clock.left_s < 4 * settings.load_s:
                results.left_out.append(f"{what}: no time was left")
                continue
            _say(what)
            try:
                results.served.append(_loaded(server, workload, precision, transport, settings, clock, results))
            except Exception as error:  # the other models are still worth having
                results.left_out.append(f"{what}: {str(error)[-300:]}")


def _loaded(
    server: ServerProcess,
    workload: Workload,
    precision: Precision,
    transport: str,
    settings: Settings,
    clock: Clock,
    results: Results,
) -> Served:
    rows = settings.request_rows or workload.rows

    def load(seconds: float, *options: object) -> dict[str, Any]:
        return _load(server, workload, [*map(str, options), "--rows", str(rows), "--duration", str(seconds)], clock)

    alone = load(settings.load_s / 2, "--processes", 1, "--concurrency", 1)
    peak = load(settings.load_s, "--processes", settings.processes, "--concurrency", settings.concurrency)
    if not peak["answered"] or not alone["answered"]:
        raise RuntimeError("none of the requests was answered in time")
    busy = load(settings.load_s, "--processes", settings.processes, "--rate", 0.8 * peak["answered"])
    wrong = sum(figures["wrong"] for figures in (alone, peak, busy))
    if wrong:
        what = f"served {workload.name} {precision} {transport}"
        results.left_out.append(f"{what}: {wrong} answers were not those of a lone request")
    return Served(
        workload.name,
        str(precision),
        transport,
        peak["answered"] * rows,
        peak["mean_batch_size"],
        alone["latency"]["p50_ms"],
        alone["latency"]["p99_ms"],
        busy["latency"]["p99_ms"] if busy["answered"] and not busy["failed"] and not busy["refused"] else None,
    )


def _load(server: ServerProcess, workload: Workload, options: list[str], clock: Clock) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        command = [sys.executable, "-m", "rafaga.cli", "load", "--server", server.address, "--model", workload.name]
        command += ["--deadline-ms", "30000", "--warm-up", str(_LOAD_WARM_UP_S), "--json", str(file), *options]
        done = _run(command, clock)
        if not file.exists():
            raise RuntimeError(f"rafaga load: {done.why()}")
        figures: dict[str, Any] = json.loads(file.read_text())["steps"][0]["figures"]
        return figures


@contextmanager
def _server(repository: Path, transport: str, settings: Settings, clock: Clock) -> Iterator[ServerProcess]:
    options = ["--device", settings.device, "--max-batch-size", str(settings.max_batch_size)]
    options += ["--transport", transport, "--max-queue-wait-ms", "10000", "--max-request-bytes", str(64 * 2**20)]
    log = repository.parent / f"{repository.name}-{transport}.log"
    server = ServerProcess(repository, log, options, start_timeout_s=clock.left_s)
    try:
        server.start()
        yield server
    except Exception:
        print(server.last_log_lines(), file=sys.stderr)
        raise
    finally:
        server.kill()  # nobody waits for answers any more, and time is short


class _Done(NamedTuple):
    """`code` None: its time was up."""

    code: int | None
    printed: str
    said: str

    def why(self) -> str:
        """In one line, for `left_out`."""
        if self.code is None:
            return "its time was up"
        last = [line.strip() for line in (self.said or self.printed).splitlines() if line.strip()]
        return f"exit code {self.code}: {' '.join(last)[-300:]}"


def _run(command: Sequence[str], clock: Clock) -> _Done:
    """With all processes that it starts, which end with `clock`."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        printed, said = process.communicate(timeout=clock.left_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return _Done(None, *process.communicate())
    return _Done(process.returncode, printed, said)


def _name(device: Device) -> str:
    return Nvidia().gpus()[device.index].name if device.gpu else f"REHEARSAL on the CPU of a {platform.machine()}"


def _say(text: str) -> None:
    print(f"bench.gpu: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
