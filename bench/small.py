"""Small models: what a request costs beside the model. Closed loops over the Open Inference Protocol."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bench.blocks import interleaved, ratios, spread, table
from bench.load import closed_loop
from bench.models import LENET, LSTM
from bench.servers import TRANSPORTS, TRITON, serving
from bench.triton import analyze, peers

_CONCURRENCIES = (1, 8, 32)
_WINDOW_S = 0.8


def against_triton(repository: Path, blocks: int) -> str:
    scripts = peers()
    if scripts is None:
        return "## Small models, beside Triton\n\nNot measured: RAFAGA_PEERS names no folder with a Triton.\n"
    parts = [
        "## Small models, beside Triton\n",
        "Triton's perf_analyzer is the client of all, closed loop, one row per request. One ONNX Runtime thread each, "
        "which is the best for Triton too; spinning off. Triton (core 2.51) runs the models in its Python backend, the "
        "one that public packages carry. / Triton: requests per second over Triton's, block by block. CPU: the "
        "server's, per request.\n",
    ]
    with serving(repository, (LENET, LSTM), "--precision", "fp32", threads=1, peer=True) as targets:
        for model in (LENET, LSTM):
            results = interleaved(
                {
                    (model, server, callers): partial(analyze, scripts, target, model, callers, _WINDOW_S)
                    for server, target in targets.items()
                    for callers in _CONCURRENCIES
                },
                blocks,
            )
            rows = []
            for (_, server, callers), runs in results.items():
                rates = [run.rate for run in runs]
                base = [run.rate for run in results[model, TRITON, callers]]
                versus = "" if server == TRITON else spread(ratios(rates, base), 2)
                p99, cpu = spread([run.p99_ms for run in runs], 2), spread([run.cpu_us for run in runs])
                rows.append((server, str(callers), spread(rates), versus, p99, cpu))
            head = (model, "callers", "requests/s", "/ Triton", "p99 ms", "CPU µs")
            parts.append(table(head, rows))
    return "\n".join(parts)


def lone_request(repository: Path, blocks: int, seconds: float) -> str:
    """What batching adds where there is nobody to share a batch with."""
    with serving(repository, (LENET,), "--precision", "fp32", threads=1) as targets:
        results = interleaved(
            {t: partial(closed_loop, targets[t].address, LENET, 1, seconds) for t in TRANSPORTS}, blocks
        )
    rows = [
        (
            transport,
            spread([run.p50_ms for run in runs], 3),
            spread([run.inference_p50_ms for run in runs], 3),
            spread([run.queue_p50_ms for run in runs], 3),
        )
        for transport, runs in results.items()
    ]
    head = ("LeNet-5, p50 in ms", "answer, at the client", "model's run", "queue: what batching adds")
    return "## A lone request\n\nThe SDK's client, one caller, the times that replies carry.\n\n" + table(head, rows)
