"""What bench.gpu found, as tables for docs/benchmarks.md: raw, served, and whether it is what was to be reached."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import onnxruntime as ort

from bench.gpu_models import Workload
from bench.gpu_raw import Figure
from bench.tables import table
from bench.verdicts import Aim, Case, Verdict

_WAYS = {"onnxruntime": "ONNX Runtime", "torch-eager": "torch eager", "torch-compile": "torch.compile"}
_WAYS |= {"tensorrt": "TensorRT"}
_FIGURES = ("served", "÷ raw", "rows per batch", "p50 ms alone", "p99 ms alone", "p99 ms at 80 %", "÷ p50 alone")
_NONE = "–"

# The model and precision that are judged, by the name of the figure.
_JUDGED = ("resnet50", "fp16")
_SERVED_OVER_RAW, _BUSY_OVER_ALONE = Aim(0.9), Aim(3.0, at_least=False)


@dataclass(frozen=True)
class Served:
    """rate: rows per second. Latencies are of requests: a lone caller's, and at four fifths of the peak, where None
    says that some, or all, were not answered."""

    model: str
    precision: str
    transport: str
    rate: float
    mean_rows: float
    alone_p50_ms: float
    alone_p99_ms: float
    busy_p99_ms: float | None

    @property
    def busy_over_alone(self) -> float:
        return math.nan if self.busy_p99_ms is None else self.busy_p99_ms / self.alone_p50_ms


@dataclass
class Results:
    raw: list[Figure] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def best(self, way: str, model: str, precision: str) -> Figure | None:
        figures = [f for f in self.raw if (f.way, f.model, f.precision) == (way, model, precision)]
        return max(figures, key=lambda f: f.rows_per_s, default=None)

    def served_over_raw(self, served: Served) -> float:
        """NaN where one is not known."""
        raw = self.best("onnxruntime", served.model, served.precision)
        return math.nan if raw is None else served.rate / raw.rows_per_s


def report(device: str, models: Sequence[Workload], rows: Sequence[int], results: Results) -> str:
    """`device`: its name, or that it was a rehearsal. rows: the batch sizes that were tried raw."""
    variants = [(workload.name, str(precision)) for workload in models for precision in workload.precisions]
    left_out = [f"- not measured: {what}" for what in dict.fromkeys(results.left_out)]
    return "\n".join(
        [
            f"### {device}\n",
            f"{datetime.now(UTC).date()}, onnxruntime {ort.__version__}, Python {platform.python_version()}. Rows "
            f"(images, series) per second. Raw: at the best batch size of {', '.join(map(str, rows))}, which is in "
            "brackets with the 99th percentile of such a batch's time; batches are on the device already. "
            "Served: over gRPC from this machine, the load generator beside it.\n",
            table(("model", "", *_WAYS.values()), [_raw_row(*v, results) for v in variants]),
            table(("model", "", "transport", *_FIGURES), [_served_row(served, results) for served in results.served]),
            table(("", "aim", "measured", ""), _verdicts(results)),
            *left_out,
        ]
    )


def _raw_row(model: str, precision: str, results: Results) -> list[str]:
    def rate(way: str) -> str:
        figure = results.best(way, model, precision)
        if figure is None:
            return _NONE
        return f"{figure.rows_per_s:,.0f} ({figure.rows}: {figure.p99_ms:.2f} ms) {figure.note}".strip()

    return [model, precision, *map(rate, _WAYS)]


def _served_row(served: Served, results: Results) -> list[str]:
    busy = math.nan if served.busy_p99_ms is None else served.busy_p99_ms
    cells = [served.model, served.precision, served.transport, f"{served.rate:,.0f}"]
    cells += [_number(results.served_over_raw(served)), f"{served.mean_rows:.0f}"]
    return cells + [_number(x) for x in (served.alone_p50_ms, served.alone_p99_ms, busy, served.busy_over_alone)]


def _verdicts(results: Results) -> list[list[str]]:
    judged = [served for served in results.served if (served.model, served.precision) == _JUDGED]
    figures = {
        "served ÷ raw": (_SERVED_OVER_RAW, results.served_over_raw),
        "p99 at 80 % of the peak ÷ p50 alone": (_BUSY_OVER_ALONE, lambda served: served.busy_over_alone),
    }
    rows = []
    for what, (aim, figure) in figures.items():
        cases = tuple(Case.of(served.transport, aim, [figure(served)]) for served in judged)
        measured = " · ".join(f"{case.name}: {case.shown()}" for case in cases) or _NONE
        rows.append([f"{' '.join(_JUDGED)}: {what}", str(aim), measured, Verdict(what, cases, "over {}").found()])
    return rows


def _number(value: float) -> str:
    return _NONE if math.isnan(value) else f"{value:.2f}"
