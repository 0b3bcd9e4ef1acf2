"""`python -m bench.fan_in`: how many small requests a second a server takes in when its model costs nothing, and what
holds it back.

    load generator  →  transport  →  checks, queue, batches  →  an engine that gives its inputs back  →  replies

One server for each transport, then several that share the load, each a process with an interpreter of its own: what
they take in beyond the first one's, on cores enough, is what the interpreter's lock costs. With --profile, py-spy
samples who holds that lock. With the client on the same cores the figures are the client's too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper

from bench.servers import TRANSPORTS
from bench.tables import table
from rafaga.server.app import build
from rafaga.server.config.settings import Config
from rafaga.server.scheduling.job import Arrays

_MODEL, _VALUES = "nothing", 16
_WARM_UP_S = 1.0
_SAMPLES_PER_S = 250
_WRITING_S = 30.0
_TOP = 8
_PY_SPY = "py-spy"


class Cpu(NamedTuple):
    """Seconds that a server's threads computed: those that run Python, and those of its libraries alone."""

    python_s: float
    native_s: float


@dataclass(frozen=True)
class FanIn:
    """rate: requests per second. Cores are CPU seconds per second of all servers together. held: the share of the time
    that one server's interpreter lock is held, None where nobody looked; by whom: functions by their share of that."""

    transport: str
    servers: int
    rate: float
    p99_ms: float
    python_cores: float
    native_cores: float
    held: float | None = None
    by_whom: tuple[tuple[str, float], ...] = ()

    @property
    def cpu_us(self) -> float:
        """Of the servers, per request."""
        return 1e6 * (self.python_cores + self.native_cores) / self.rate


def publish_nothing(repository: Path) -> Path:
    """A plain model of sixteen numbers that gives them back."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", _VALUES]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], _MODEL, tensors[:1], tensors[1:])
    folder = repository / _MODEL / "1"
    folder.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "model.onnx"
    )
    return folder


def serve(repository: Path, transport: str) -> None:
    """Until its standard input ends. Says where it listens, and for every line how much its threads have computed."""
    server = build(Config.of(repository=repository, transport=transport, grpc_port=0, http_port=0))
    server.start()
    model = server.repository.version(_MODEL, 0).model
    assert model is not None
    for engine in model.engines:
        engine.run = _give_back  # type: ignore[method-assign]
    print(f"127.0.0.1:{server.grpc_port}", flush=True)
    for _ in sys.stdin:
        ours = {thread.native_id for thread in threading.enumerate()}
        seconds = {True: 0.0, False: 0.0}
        for thread in psutil.Process().threads():
            seconds[thread.id in ours] += thread.user_time + thread.system_time
        print(json.dumps(Cpu(seconds[True], seconds[False])), flush=True)
    server.drain_and_stop()


def _give_back(inputs: Arrays) -> Arrays:
    return inputs


class Server:
    """A process of `serve`."""

    def __init__(self, repository: Path, transport: str) -> None:
        command = [sys.executable, "-m", "bench.fan_in", "serve", str(repository), "--transports", transport]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.pid = self._process.pid
        self.address = self._line()

    def cpu(self) -> Cpu:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Cpu(*json.loads(self._line()))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError("the server ended: `python -m bench.fan_in serve` says why")
        return line


def measure(transport: str, servers: int, callers: int, processes: int, seconds: float, profile: bool) -> FanIn:
    """Closed loop of `callers`, over as many generator processes. Raises RuntimeError when a request failed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        publish_nothing(folder / "repository")
        running = []
        for _ in range(servers):
            running.append(Server(folder / "repository", transport))
            stack.callback(running[-1].close)
        file = folder / "run.json"
        addresses = ",".join(server.address for server in running)
        command = [sys.executable, "-m", "rafaga.cli", "load", "--server", addresses, "--model", _MODEL]
        command += ["--protocol", "open-inference", "--concurrency", str(callers), "--processes", str(processes)]
        command += ["--warm-up", str(_WARM_UP_S), "--duration", str(seconds), "--json", str(file)]
        before = [server.cpu() for server in running]
        with _held(running[0].pid, folder / "held.txt", profile) as samples:
            begin = time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            wall_s = time.monotonic() - begin
            counts = samples()
        if not file.exists():
            raise RuntimeError(f"rafaga load: {done.stdout[-300:]}{done.stderr[-300:]}")
        figures: dict[str, Any] = json.loads(file.read_text())["steps"][0]["figures"]
        if figures["failed"] or figures["refused"] or figures["wrong"]:
            raise RuntimeError(f"not every request was answered rightly: {figures}")
        used = np.array([server.cpu() for server in running]) - np.array(before)
    # Servers compute, and hold their locks, only while they are asked: the generator's own start must not count.
    loaded_s = min(wall_s, seconds + _WARM_UP_S)
    python_s, native_s = map(float, used.sum(axis=0))
    total = sum(counts.values())
    return FanIn(
        transport,
        servers,
        figures["answered"],
        figures["latency"]["p99_ms"],
        python_s / loaded_s,
        native_s / loaded_s,
        total / (_SAMPLES_PER_S * loaded_s) if profile else None,
        tuple((name, n / total) for name, n in counts.most_common(_TOP)),
    )


@contextmanager
def _held(pid: int, file: Path, profile: bool) -> Iterator[Callable[[], Counter[str]]]:
    """From now on. What it gives ends the watching, and tells how often which function was seen holding the lock of the
    interpreter; nothing where nobody looked. That raises RuntimeError where py-spy could not look."""
    if not profile:
        yield Counter
        return
    command = [_PY_SPY, "record", "--gil", "--function", "--format", "raw", "--rate", str(_SAMPLES_PER_S)]
    command += ["--pid", str(pid), "--output", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def counted() -> Counter[str]:
        process.send_signal(signal.SIGINT)  # it writes down what it has
        _, said = process.communicate(timeout=_WRITING_S)
        if not file.exists():
            raise RuntimeError(f"{_PY_SPY} wrote nothing down: {said.strip()[-300:]}")
        counts: Counter[str] = Counter()
        for line in file.read_text().splitlines():
            stack, _, number = line.rpartition(" ")
            counts[stack.rpartition(";")[2]] += int(number)
        return counts

    try:
        yield counted
    finally:
        process.kill()
        process.communicate()


def report(found: Sequence[FanIn]) -> str:
    first = {one.transport: one.rate for one in found if one.servers == 1}
    rows = [
        [
            one.transport,
            str(one.servers),
            f"{one.rate:,.0f}",
            f"{one.rate / first[one.transport]:.2f}" if one.transport in first else "–",
            f"{one.p99_ms:.2f}",
            f"{one.cpu_us:.0f}",
            f"{one.python_cores:.2f}",
            f"{one.native_cores:.2f}",
            "–" if one.held is None else f"{one.held:.0%}",
        ]
        for one in found
    ]
    head = ("transport", "servers", "requests/s", "÷ one server", "p99 ms", "CPU µs per request")
    text = table((*head, "cores in Python's threads", "in others", "lock held"), rows)
    for one in found:
        if one.by_whom:
            who = ", ".join(f"{name} {share:.0%}" for name, share in one.by_whom)
            text += f"\n{one.transport}, {one.servers}: the lock was held by {who}\n"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fan_in", description=__doc__.partition("\n\n")[0])
    parser.add_argument("step", nargs="?", choices=("measure", "serve"), default="measure")
    parser.add_argument("repository", nargs="?", type=Path, help="of serve")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS)
    parser.add_argument("--servers", nargs="+", type=int, default=[1, 2], help="processes (default: 1 2)")
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2, help="of the load generator (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--profile", action="store_true", help="with py-spy, which slows it down a little")
    options = parser.parse_args()
    if options.profile and shutil.which(_PY_SPY) is None:
        parser.error(f"--profile needs {_PY_SPY}, which is not on the path: pip install {_PY_SPY}")
    if options.step == "serve":
        serve(options.repository, options.transports[0])
        return 0
    found = [
        measure(transport, servers, options.callers, options.processes, options.seconds, options.profile)
        for transport in options.transports
        for servers in options.servers
    ]
    print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
