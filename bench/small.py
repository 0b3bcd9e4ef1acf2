"""Small models: what a request costs in addition to the model. perf_analyzer is the client of every server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from bench.blocks import Blocks, Cells, Plan, column, parts, ratios
from bench.clients import perf_analyzer
from bench.models import LENET, LSTM, file
from bench.servers import peer_script, rafaga, triton
from bench.tables import Table, spread

_MODELS = (LENET, LSTM)
_CALLERS = (1, 8, 32)
_THREADS = 1  # the best for Triton too: with more it is slower on cores that it shares with its client
_TRITON = "Triton"


@contextmanager
def cells(plan: Plan) -> Iterator[Cells]:
    options = ("--device", "cpu", "--precision", "fp32", "--threads", str(_THREADS))
    with ExitStack() as stack:
        servers = {
            "rafaga": stack.enter_context(rafaga(plan.repository, _MODELS, *options)),
            "rafaga TLS": stack.enter_context(rafaga(plan.repository, _MODELS, *options, tls=True)),
        }
        if plan.baseline is not None:
            before = rafaga(plan.repository, _MODELS, *options, checkout=plan.baseline)
            servers["baseline"] = stack.enter_context(before)
        if (script := peer_script("triton_peer.sh")) is not None:
            files = {model: file(plan.repository, model) for model in _MODELS}
            servers[_TRITON] = stack.enter_context(triton(script, files, _THREADS))
        yield {
            f"{model}/{callers}/{server}": partial(perf_analyzer, target, model, callers, plan.seconds)
            for model in _MODELS
            for callers in _CALLERS
            for server, target in servers.items()
        }


def tables(blocks: Blocks) -> list[Table]:
    return [_of(model, blocks) for model in parts(blocks, 0)]


def _of(model: str, blocks: Blocks) -> Table:
    rows = []
    for cell in (name for name in blocks[0] if name.startswith(f"{model}/")):
        _, callers, server = cell.split("/")
        over_triton = [] if server == _TRITON else ratios(blocks, cell, f"{model}/{callers}/{_TRITON}")
        cost = spread(column(blocks, cell, "server_cpu_us"))
        rows.append((f"{callers:>2} {server}", spread(column(blocks, cell, "rate")), spread(over_triton, 2), cost))
    return Table((model, "requests/s", "÷ Triton", "CPU µs/request"), rows)
