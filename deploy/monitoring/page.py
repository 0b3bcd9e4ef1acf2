"""docs/metrics.md: every metric with its labels, the recorded series, the alerts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from deploy.monitoring.rules import GUIDE
from deploy.monitoring.signals import Pace, alerts, recordings
from rafaga.server.observability.families import FAMILIES, GPU_FAMILIES, LABELS, Family, Kind
from rafaga.server.observability.triton import ALIASES


def page(pace: Pace) -> str:
    return "\n".join(_lines(pace)) + "\n"


def _lines(pace: Pace) -> Iterator[str]:
    yield "# Metrics"
    yield ""
    yield "Made by `python -m deploy.monitoring`; do not edit."
    yield ""
    yield "`GET /metrics` on the HTTP port (8080) answers in Prometheus' text format. Times are in seconds, rows are"
    yield "images or series. Histograms are of calls, requests or batches that ended, never of those under way."
    yield ""
    yield from _table(("metric", "kind", "labels", "what"), map(_row, FAMILIES))
    yield ""
    yield "Counters are stored as `…_total`, histograms as `…_bucket`, `…_sum` and `…_count`. Beside these there are"
    yield "`process_*` (CPU, memory, open files, start time) and `python_info` of the process."
    yield ""
    yield "Deadlines are missed on arrival (`rafaga_refusals`, reason `DEADLINE_UNREACHABLE`), in the queue"
    yield "(`rafaga_dropped`, cause `deadline`) and in the engine; `rafaga_requests` with `DEADLINE_EXCEEDED` has all."
    yield ""
    yield "Where the server sees GPUs and nvidia-ml-py is installed, as in the image for GPUs:"
    yield ""
    yield from _table(("metric", "kind", "labels", "what"), map(_row, GPU_FAMILIES))
    yield ""
    yield "NVIDIA's DCGM exporter tells more of them, and of all of a node's."
    yield ""
    yield "## Labels"
    yield ""
    yield from _table(("label", "what"), ((f"`{name}`", text) for name, text in LABELS.items()))
    yield ""
    yield "Models are as many as the repository holds; nothing that a caller sends becomes a label."
    yield ""
    yield "## Buckets"
    yield ""
    for family in FAMILIES:
        if family.kind is Kind.HISTOGRAM:
            yield f"- `{family.name}`: {', '.join(f'{bound:g}' for bound in family.buckets)}"
    yield ""
    yield "## Under Triton's names"
    yield ""
    yield "With `--triton-metrics true` (`triton_metrics = true`) the server counts under these names too, so that"
    yield "dashboards and autoscaling recipes made for Triton go on working. Labels: `model`, `version`."
    yield ""
    yield from _table(("metric", "what"), ((f"`{alias.name}`", alias.text) for alias in ALIASES))
    yield ""
    yield "Triton's times for copying inputs and outputs are part of the engine's here, and 0 under their own names: a"
    yield "query that adds all the times is right, and not empty."
    yield ""
    yield "## Recorded series"
    yield ""
    yield "`deploy/prometheus/rules.yaml` records what autoscalers ask for:"
    yield ""
    yield from _table(("series", "expression"), ((f"`{r.name}`", f"`{r.expression}`") for r in recordings(pace)))
    yield ""
    yield "## Alerts"
    yield ""
    yield f"What to do on each: [{GUIDE}](operating.md#alerts)."
    yield ""
    rows = ((f"[{a.name}](operating.md#{a.name.lower()})", a.severity.value, f"`{a.expression}`") for a in alerts(pace))
    yield from _table(("alert", "severity", "condition"), rows)


def _row(family: Family) -> tuple[str, ...]:
    return f"`{family.name}`", family.kind.value, ", ".join(f"`{label}`" for label in family.labels), family.text


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
