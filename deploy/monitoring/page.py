"""docs/metrics.md: every metric with its labels, the recorded series, the alerts."""

from __future__ import annotations

from collections.abc import Iterable

from deploy.monitoring.rules import GUIDE
from deploy.monitoring.signals import Pace, alerts, recordings
from rafaga.server.observability.families import FAMILIES, GPU_FAMILIES, LABELS, Family, Kind
from rafaga.server.observability.triton import ALIASES

_PAGE = """# Metrics

Made by `python -m deploy.monitoring`; do not edit.

`GET /metrics` on the HTTP port (8080) answers in Prometheus' text format. Times are in seconds; rows are images or
series. Histograms count calls, requests or batches that ended, not those in progress.

{metrics}

Counters are stored as `…_total`, histograms as `…_bucket`, `…_sum` and `…_count`. `process_*` (CPU, memory, open files,
start time) and `python_info` describe the process.

A deadline can be missed on arrival (`rafaga_refusals`, reason `DEADLINE_UNREACHABLE`), in the queue (`rafaga_dropped`,
cause `deadline`) and in the engine; `rafaga_requests` with `DEADLINE_EXCEEDED` counts all of them.

If the server sees GPUs and nvidia-ml-py is installed, as in the image for GPUs:

{gpu_metrics}

NVIDIA's DCGM exporter gives more metrics, of all GPUs of a node.

## Labels

{labels}

There is one value of `model` per model in the repository; nothing that a caller sends becomes a label.

## Buckets

{buckets}

## Under Triton's names

With `--triton-metrics true` (`triton_metrics = true`) the server also counts under these names, so that dashboards and
autoscaling recipes made for Triton keep working. Labels: `model`, `version`.

{aliases}

Triton's times for copying inputs and outputs are part of the engine's time here, and 0 under their own names: a query
that adds all times is correct, and not empty.

## Recorded series

`deploy/prometheus/rules.yaml` records the series that autoscalers query:

{recordings}

## Alerts

What to do on each: [{guide}](operating.md#alerts).

{alerts}
"""


def page(pace: Pace) -> str:
    head = ("metric", "kind", "labels", "meaning")
    rows = ((f"[{a.name}](operating.md#{a.name.lower()})", a.severity.value, f"`{a.expression}`") for a in alerts(pace))
    return _PAGE.format(
        metrics=_table(head, map(_row, FAMILIES)),
        gpu_metrics=_table(head, map(_row, GPU_FAMILIES)),
        labels=_table(("label", "meaning"), ((f"`{name}`", text) for name, text in LABELS.items())),
        buckets="\n".join(
            f"- `{family.name}`: {', '.join(f'{bound:g}' for bound in family.buckets)}"
            for family in FAMILIES
            if family.kind is Kind.HISTOGRAM
        ),
        aliases=_table(("metric", "meaning"), ((f"`{alias.name}`", alias.text) for alias in ALIASES)),
        recordings=_table(("series", "expression"), ((f"`{r.name}`", f"`{r.expression}`") for r in recordings(pace))),
        guide=GUIDE,
        alerts=_table(("alert", "severity", "condition"), rows),
    )


def _row(family: Family) -> tuple[str, ...]:
    return f"`{family.name}`", family.kind.value, ", ".join(f"`{label}`" for label in family.labels), family.text


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    cells = (" | ".join(cell.replace("|", chr(92) + "|") for cell in row) for row in rows)
    return "\n".join((f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {row} |" for row in cells)))
