"""One caller: what the server adds to a lone request, compared with the same run in ONNX Runtime alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from bench.blocks import Blocks, Cells, Figures, Plan, column, parts
from bench.clients import rafaga_load
from bench.models import LENET, RESNET, file
from bench.raw import RawModel
from bench.servers import rafaga
from bench.tables import Table, spread

_MODELS = (LENET, RESNET)
_THREADS = 1


@contextmanager
def cells(plan: Plan) -> Iterator[Cells]:
    options = ("--device", "cpu", "--precision", "fp32", "--threads", str(_THREADS))
    with rafaga(plan.repository, _MODELS, *options) as target:
        measures: dict[str, Callable[[], Figures]] = {}
        for model in _MODELS:
            raw = RawModel(file(plan.repository, model), _THREADS)
            measures[f"{model}/raw"] = partial(raw.measure, 1, plan.seconds)
            measures[f"{model}/served"] = partial(rafaga_load, target, model, plan.seconds, "--concurrency", 1)
        yield measures


def tables(blocks: Blocks) -> list[Table]:
    rows = []
    for model in parts(blocks, 0):
        raw, latency = (column(blocks, f"{model}/{way}", "p50_ms") for way in ("raw", "served"))
        run, queue = (column(blocks, f"{model}/served", figure) for figure in ("run_p50_ms", "queue_p50_ms"))
        added = [whole - alone for whole, alone in zip(latency, raw, strict=True)]
        rows.append((model, *map(spread, (raw, run, queue, added))))
    return [Table(("p50, ms", "raw run", "run", "queue", "latency - raw"), rows)]
