"""More requests than the machine can answer: how many get their answer within the deadline, and what each costs.

Client and server share all cores. Requests arrive at random (Poisson) at multiples of the server's own peak, which 32
callers in a closed loop give.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from bench.blocks import Blocks, Cells, Figures, Plan, column, parts, ratios
from bench.clients import closed_loop, rafaga_load
from bench.models import RESNET, file
from bench.servers import Target, peer_script, rafaga, triton
from bench.tables import Table, spread
from rafaga.server.engines.cpu_count import available_cores

_DEADLINE_MS = 500.0
_CALLERS = 32
_OVER = (2, 5)
_PROTOCOL = ("--protocol", "open-inference")


@contextmanager
def cells(plan: Plan) -> Iterator[Cells]:
    threads = available_cores()
    # The callers that find the peak must not be refused.
    options = ("--device", "cpu", "--precision", "fp32", "--threads", str(threads), "--max-queue-wait-ms", "10000")
    with ExitStack() as stack:
        servers = {"rafaga": stack.enter_context(rafaga(plan.repository, (RESNET,), *options))}
        if (script := peer_script("triton_peer.sh")) is not None:
            servers["Triton"] = stack.enter_context(triton(script, {RESNET: file(plan.repository, RESNET)}, threads))
        measures: dict[str, Callable[[], Figures]] = {}
        for server, target in servers.items():
            load = Load(target, plan.seconds)
            measures[f"{server}/peak"] = load.peak
            measures |= {f"{server}/{times}×": partial(load.over, times) for times in _OVER}
        yield measures


class Load:
    """On one server, relative to the peak that was measured last."""

    def __init__(self, target: Target, seconds: float) -> None:
        self._target = target
        self._seconds = seconds
        self._peak = self.peak()["rate"]

    def peak(self) -> Figures:
        figures = closed_loop(self._target, RESNET, _CALLERS, self._seconds, *_PROTOCOL)
        self._peak = figures["rate"]
        return figures

    def over(self, times: float) -> Figures:
        options = ("--rate", times * self._peak, *_PROTOCOL)
        return rafaga_load(self._target, RESNET, self._seconds, *options, deadline_ms=_DEADLINE_MS)


def tables(blocks: Blocks) -> list[Table]:
    rows = []
    for cell in (f"{server}/{load}" for server in parts(blocks, 0) for load in parts(blocks, 1)):
        server, load = cell.split("/")
        rates = spread(column(blocks, cell, "rate"))
        of_peak = "" if load == "peak" else spread(ratios(blocks, cell, f"{server}/peak"), 2)
        server_ms = spread([statistics.median(column(blocks, cell, "server_cpu_us")) / 1e3])
        client = f"{max(column(blocks, cell, 'client_cores')):.2f}"
        rows.append((f"{server} {load}", rates, of_peak, server_ms, client))
    return [Table(("", "in time/s", "÷ peak", "CPU ms/request", "client"), rows)]
