"""More requests than the machine can answer: how many are still answered in time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bench.blocks import interleaved, ratios, spread, table
from bench.load import closed_loop, open_loop
from bench.servers import serving

_MODEL = "googlenet"
_DEADLINE_MS = 500.0
_SECONDS = 10.0
_PEAK_CALLERS = 32
_ALONE, _BUSY, _TWICE, _FIVEFOLD = "alone", 0.8, 2.0, 5.0


def overload(repository: Path, blocks: int, threads: int) -> str:
    with serving(repository, (_MODEL,), "--precision", "fp32", threads=threads, peer=True) as targets:
        peaks = {
            s: closed_loop(t.address, _MODEL, _PEAK_CALLERS, _SECONDS, "open-inference").rate
            for s, t in targets.items()
        }
        results = interleaved(
            {
                (server, load): partial(open_loop, target.address, _MODEL, peaks[server] * load, _SECONDS, _DEADLINE_MS)
                for server, target in targets.items()
                for load in (_BUSY, _TWICE, _FIVEFOLD)
            }
            | {
                (server, _ALONE): partial(closed_loop, target.address, _MODEL, 1, _SECONDS / 2, "open-inference")
                for server, target in targets.items()
            },
            blocks,
        )
    rows = []
    for server, peak in peaks.items():
        busy, twice, fivefold = (results[server, load] for load in (_BUSY, _TWICE, _FIVEFOLD))
        p99_busy, p99_twice = ([run.p99_ms for run in runs] for runs in (busy, twice))
        rows.append(
            (
                server,
                f"{peak:.1f}",
                *(spread([run.rate / peak for run in runs], 2) for runs in (busy, twice, fivefold)),
                spread(ratios(p99_busy, [run.p50_ms for run in results[server, _ALONE]]), 1),
                spread(ratios(p99_twice, p99_busy), 2),
            )
        )
    head = (
        "server",
        "peak/s",
        *(f"in time at {load:g}×, over the peak" for load in (_BUSY, _TWICE, _FIVEFOLD)),
        "p99 at 0.8× / alone",
        "p99 of answers at 2× / at 0.8×",
    )
    return (
        "## Overload\n\n"
        f"GoogLeNet, random weights, independent (Poisson) arrivals at multiples of the server's own peak, which "
        f"{_PEAK_CALLERS} callers in a closed loop give; every request has {_DEADLINE_MS:g} ms from when it is due. "
        "Latencies count from then too.\n\n" + table(head, rows)
    )
