"""Large models at saturation: the server against ONNX Runtime alone, int8 against fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from bench.blocks import Blocks, Cells, Figures, Plan, column, ratios
from bench.clients import closed_loop
from bench.models import LARGE, file
from bench.raw import RawModel
from bench.servers import rafaga
from bench.tables import Table, spread
from rafaga.server.engines.cpu_count import available_cores

_PRECISIONS = ("fp32", "int8")


@contextmanager
def cells(plan: Plan) -> Iterator[Cells]:
    """Twice the time of other sections: a measurement must hold many batches."""
    threads, seconds = available_cores(), 2 * plan.seconds
    measures: dict[str, Callable[[], Figures]] = {}
    with ExitStack() as stack:
        for precision in _PRECISIONS:
            options = ["--device", "cpu", "--precision", precision, "--threads", str(threads)]
            # Callers in a closed loop wait: refusals would only add requests.
            options += ["--max-queue-wait-ms", "60000"]
            target = stack.enter_context(rafaga(plan.repository, LARGE, *options))
            for model in LARGE:
                raw = RawModel(file(plan.repository, model, precision), threads)
                rows = raw.best_rows()
                callers = max(16, 2 * rows)
                measures[f"{model}/{precision}/raw"] = partial(raw.measure, rows, seconds)
                measures[f"{model}/{precision}/served"] = partial(closed_loop, target, model, callers, seconds)
        yield {name: measures[name] for name in sorted(measures, key=lambda name: LARGE.index(name.split("/")[0]))}


def tables(blocks: Blocks) -> list[Table]:
    rates, compared = [], []
    for served in (name for name in blocks[0] if name.endswith("/served")):
        model, precision, _ = served.split("/")
        raw, label = f"{model}/{precision}/raw", f"{model} {precision}"
        batch = f"{column(blocks, raw, 'rows')[0]:.0f}"
        rates.append((label, batch, *(spread(column(blocks, cell, "rate")) for cell in (raw, served))))
        bases = (raw, f"{model}/fp32/served")
        compared.append((label, *(spread(ratios(blocks, served, base), 2) for base in bases)))
    return [
        Table(("images/s", "raw batch", "raw", "served"), rates),
        Table(("served", "÷ raw", "÷ fp32 served"), compared),
    ]
