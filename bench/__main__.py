"""Runs every measurement, blocks interleaved, and writes the tables."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from bench import machine, raw
from bench.load import LoadResult, closed_loop
from demo.server import ServerProcess
from rafaga.server.engine import available_cores

TRANSPORTS = ("grpcio", "native")
CONCURRENCIES = (1, 8, 32)
# Enough callers that a batch is always waiting while one runs.
SATURATING = 16


Key = TypeVar("Key")
Value = TypeVar("Value")


class Row(NamedTuple):
    """Median and range of one figure over the blocks."""

    name: str
    values: list[float]

    def cell(self, digits: int = 0) -> str:
        low, middle, high = min(self.values), statistics.median(self.values), max(self.values)
        return f"{middle:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--blocks", type=int, default=5, help="repetitions of every measurement (default: 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement (default: 3)")
    parser.add_argument("--repository", type=Path, default=Path("build/bench-repository"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    _export(options.repository, "lenet5-mnist", "auto")
    _export(options.repository, "resnet50", "random")
    text = "\n".join(
        [
            "# Benchmarks\n",
            "Written by `make bench`. Median (lowest–highest) of "
            f"{options.blocks} interleaved blocks of {options.seconds:g} s. Client and server share the machine.\n",
            machine.describe() + "\n",
            _small_model(options.repository, options.blocks, options.seconds),
            _served_over_raw(options.repository, options.blocks, options.seconds),
        ]
    )
    options.output.write_text(text)
    print(f"\n{text}\nwritten to {options.output}")
    return 0


def _small_model(repository: Path, blocks: int, seconds: float) -> str:
    """LeNet-5: requests of one digit as a tensor, by callers that wait for each answer."""
    with _servers(repository) as servers:
        results = _interleaved(
            {
                (transport, concurrency): _load(servers[transport], "lenet5-mnist", concurrency, seconds)
                for transport in TRANSPORTS
                for concurrency in CONCURRENCIES
            },
            blocks,
        )
    lines = [
        "## LeNet-5, one digit per request\n",
        "Closed loop, one client process; with few cores the client's own work is part of every figure.\n",
        "| transport | callers | requests/s | p50 ms | p99 ms | rows per batch | client cores |",
        "|---|---|---|---|---|---|---|",
    ]
    for (transport, concurrency), runs in results.items():
        cells = [
            Row("rate", [r.rate for r in runs]).cell(),
            Row("p50", [r.p50_ms for r in runs]).cell(2),
            Row("p99", [r.p99_ms for r in runs]).cell(2),
            Row("batch", [r.batch_size for r in runs]).cell(1),
            Row("cpu", [r.client_cpu for r in runs]).cell(2),
        ]
        lines.append(f"| {transport} | {concurrency} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _served_over_raw(repository: Path, blocks: int, seconds: float) -> str:
    """ResNet-50: images per second through the server, over ONNX Runtime alone with the same threads."""
    threads, seconds = available_cores(), max(seconds, 5.0)
    alone = raw.load(_newest(repository, "resnet50"), threads)
    with _servers(repository, "--threads", str(threads)) as servers:
        measures: dict[str, Callable[[], float]] = {"raw": lambda: alone.rate(seconds)}
        for transport in TRANSPORTS:
            load = _load(servers[transport], "resnet50", SATURATING, seconds)
            measures[transport] = lambda load=load: load().rate  # type: ignore[misc]
        results = _interleaved(measures, blocks)
    lines = [
        "## ResNet-50 (random weights), one 224×224 image per request\n",
        f"{SATURATING} callers, {threads} ONNX Runtime threads. Raw is ONNX Runtime alone at its best batch size, "
        f"here {alone.best_rows}.\n",
        "| | images/s | served / raw |",
        "|---|---|---|",
        f"| ONNX Runtime alone | {Row('raw', results['raw']).cell(1)} | |",
    ]
    for transport in TRANSPORTS:
        ratios = [served / base for served, base in zip(results[transport], results["raw"], strict=True)]
        lines.append(f"| {transport} | {Row('served', results[transport]).cell(1)} | {Row('ratio', ratios).cell(2)} |")
    return "\n".join(lines) + "\n"


def _interleaved(measures: dict[Key, Callable[[], Value]], blocks: int) -> dict[Key, list[Value]]:
    """Every measure once per block, forwards and backwards in turn: A-B-B-A."""
    results: dict[Key, list[Value]] = {key: [] for key in measures}
    for block in range(blocks):
        for key in list(measures)[:: 1 if block % 2 == 0 else -1]:
            results[key].append(measures[key]())
            print(f"block {block + 1}/{blocks}  {key}  {results[key][-1]}", flush=True)
    return results


@contextmanager
def _servers(repository: Path, *options: str) -> Iterator[dict[str, ServerProcess]]:
    """One server per transport; the idle one sleeps and costs nothing."""
    with tempfile.TemporaryDirectory() as folder:
        servers = {
            transport: ServerProcess(
                repository, Path(folder) / f"{transport}.log", ["--transport", transport, *options]
            )
            for transport in TRANSPORTS
        }
        try:
            for server in servers.values():
                server.start()
            yield servers
        finally:
            for server in servers.values():
                server.kill()


def _load(server: ServerProcess, model: str, concurrency: int, seconds: float) -> Callable[[], LoadResult]:
    return lambda: closed_loop(server.address, model, concurrency, seconds)


def _export(repository: Path, name: str, weights: str) -> None:
    if not (repository / name).is_dir():
        command = [sys.executable, "-m", "export", name, "--weights", weights, "--output", str(repository)]
        subprocess.run([*command, "--precisions", "fp32"], check=True)


def _newest(repository: Path, name: str) -> Path:
    return max((repository / name).glob("[1-9]*"), key=lambda folder: int(folder.name))


if __name__ == "__main__":
    sys.exit(main())
