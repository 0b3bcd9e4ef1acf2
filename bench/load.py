"""A closed loop of callers in a process of its own: `python -m bench.load ADDRESS METHOD FILE CONCURRENCY SECONDS`.

Sends the serialised request in FILE over and over and prints one JSON line. Requests are not built and replies are not
parsed while the clock runs, so that on few cores the client takes as little as it can from the server.
"""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import numpy as np

_WARM_UP_S = 0.5
_CHANNELS = 8


@dataclass(frozen=True)
class LoadResult:
    """rate: answers per second. p50_ms, p99_ms: latency. client_cpu: cores that the callers used."""

    rate: float
    p50_ms: float
    p99_ms: float
    errors: int
    client_cpu: float


def closed_loop(address: str, method: str, request: bytes, concurrency: int, seconds: float) -> LoadResult:
    """Runs the callers in a subprocess. Raises RuntimeError when it fails."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(request)
        file.flush()
        command = [sys.executable, "-m", "bench.load", address, method, file.name, str(concurrency), str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode:
        raise RuntimeError(f"the load generator failed:\n{done.stderr}")
    return LoadResult(**json.loads(done.stdout))


async def _run(address: str, method: str, request: bytes, concurrency: int, seconds: float) -> LoadResult:
    # A pool of subchannels each: with one connection, HTTP/2 flow control becomes what is measured.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(min(_CHANNELS, concurrency))]
    calls = [channel.unary_unary(method, None, None) for channel in channels]
    latencies: list[float] = []
    errors = 0
    start = time.perf_counter() + _WARM_UP_S
    end = start + seconds

    async def caller(call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]) -> None:
        nonlocal errors
        while (sent := time.perf_counter()) < end:
            try:
                await call(request, timeout=30)
            except grpc.aio.AioRpcError:
                errors += 1
                continue
            if sent >= start:
                latencies.append(time.perf_counter() - sent)

    callers = [asyncio.create_task(caller(calls[i % len(calls)])) for i in range(concurrency)]
    await asyncio.sleep(_WARM_UP_S)
    before = _cpu_s()
    await asyncio.gather(*callers)
    wall = time.perf_counter() - start
    milliseconds = np.array(latencies or [np.nan]) * 1e3
    for channel in channels:
        await channel.close(None)
    return LoadResult(
        rate=len(latencies) / wall,
        p50_ms=float(np.percentile(milliseconds, 50)),
        p99_ms=float(np.percentile(milliseconds, 99)),
        errors=errors,
        client_cpu=(_cpu_s() - before) / wall,
    )


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    address, method, path, concurrency, seconds = sys.argv[1:]
    result = asyncio.run(_run(address, method, Path(path).read_bytes(), int(concurrency), float(seconds)))
    print(json.dumps(asdict(result)))
