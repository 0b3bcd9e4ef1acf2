"""The page: the verdict first, then the figures, then the plots with a sentence on how to read each."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from rafaga.load.document import LoadRun, StepResult
from rafaga.load.figures import REMEDY, Figures, Judged, describe_outcomes
from rafaga.load.report import plots
from rafaga.load.text import some_of_several, warnings, worst_queue
from rafaga.load.view import describe

_STYLE = """
:root { --ink: #1e293b; --muted: #64748b; --line: #e2e8f0; --good: #15803d; --bad: #b91c1c; --warn: #b45309; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 40px 28px 64px; color: var(--ink); background: #fff;
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 44px 0 4px; }
p { margin: 4px 0 12px; max-width: 76ch; }
.sub, .note { color: var(--muted); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 24px 0; }
.tile { flex: 1 1 130px; border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; letter-spacing: -0.01em; }
.tile span { color: var(--muted); font-size: 13px; }
.banner { border-left: 4px solid; padding: 8px 14px; margin: 20px 0; background: #f8fafc; }
.banner ul { margin: 4px 0 0; padding-left: 20px; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; width: 100%; }
th { color: var(--muted); font-weight: 600; text-align: right; padding: 6px 6px;
     border-bottom: 1px solid var(--muted); }
td { text-align: right; border-bottom: 1px solid var(--line); padding: 6px 6px; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { display: block; width: 100%; height: auto; margin: 8px 0 0; }
svg text { font-family: inherit !important; }
footer { margin-top: 48px; border-top: 1px solid var(--line); padding-top: 12px; color: var(--muted); font-size: 13px; }
"""

_SECTIONS = (
    (
        "Latency against throughput",
        plots.latency_against_throughput,
        "Where the answered rate falls below the offered rate, the server is at its limit. Points below the dotted "
        "line met the objective.",
    ),
    (
        "Over time",
        plots.over_time,
        "Requests are shown at the time they were due, not when they were sent or answered: a stall appears as a peak "
        "that begins when the stall began.",
    ),
    (
        "Distribution",
        plots.distribution,
        "From 90 on, each grid line leaves a tenth of the requests of the one before. For a single load, the dashed "
        "line counts latency from the send, as some tools do: where it is below the solid line, requests waited in the "
        "generator.",
    ),
    (
        "Batches",
        plots.batch_sizes,
        "Replies count requests, so a large batch counts once per request in it. Metrics count runs of the engine, "
        "including those for other callers.",
    ),
    (
        "Where the time went",
        plots.breakdown,
        "Queue, preprocessing and inference from the replies. If replies have no times, these are means of the "
        "server's /metrics, including requests of other callers. The rest of the latency is the network, gRPC on both "
        "sides and the operating system.",
    ),
    ("Refused and failed", plots.failures, "By the machine-readable reason that came with the status."),
)


def render(run: LoadRun) -> str:
    """The whole document."""
    title = f"Load test of {', '.join(run.conditions.models)}"
    body = "\n".join(_body(run, title))
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _body(run: LoadRun, title: str) -> Iterator[str]:
    conditions = run.conditions
    share = "" if run.part.of == 1 else f" · part {run.part.index + 1} of {run.part.of}"
    yield f"<h1>{escape(title)}</h1>"
    yield (
        f'<p class="sub">{escape(run.server)} over {conditions.protocol} · {escape(_mix(run))} · '
        f"{escape(conditions.payload)} · deadline {conditions.deadline_ms:,.10g} ms · "
        f"{escape(run.started.replace('T', ' ').replace('+00:00', ' UTC'))}{share}</p>"
    )
    yield from _verdict(run)
    if len(run.steps) == 1:
        yield _tiles(run.steps[0], conditions.objective is not None)
    yield _table(run)
    if found := warnings(run):
        items = "".join(f"<li>{escape(warning)}</li>" for warning in found)
        yield f'<div class="banner warn">{escape(REMEDY[0].upper() + REMEDY[1:])}.<ul>{items}</ul></div>'
    for heading, plot, reading in _SECTIONS:
        if svg := plot(run):
            yield f"<h2>{heading}</h2><p class='note'>{reading}</p>{svg}"
    if not any(describe_outcomes(r.tally.outcomes) for r in run.steps):
        yield "<h2>Refused and failed</h2><p>No request was refused, and none failed.</p>"
    yield from _models(run)
    yield from _server(run)
    yield (
        "<footer>Latency counts from when a request was due by its schedule, which is independent of the server "
        "(no coordinated omission). Warm-up is not counted. Percentiles are of merged raw counts in HDR histograms "
        f"with three significant digits. rafaga {escape(run.rafaga)}.</footer>"
    )


def _mix(run: LoadRun) -> str:
    models = run.conditions.models
    whole = sum(models.values())
    return ", ".join(name if len(models) == 1 else f"{name} {weight / whole:.0%}" for name, weight in models.items())


def _verdict(run: LoadRun) -> Iterator[str]:
    goal = run.conditions.objective
    if run.wrong:
        yield f'<div class="banner bad"><b>{run.wrong:,} answers were wrong.</b></div>'
    if goal is None:
        return
    if run.max_rate and not run.search_missed:
        yield (
            f'<div class="banner good">At least <b>{run.max_rate:,.1f} requests/s:</b> 99 of 100 requests were '
            f"answered {escape(str(goal))}, and the search ended before a miss.</div>"
        )
    elif run.max_rate:
        yield (
            f'<div class="banner good"><b>{run.max_rate:,.1f} requests/s</b> is the highest rate found at which 99 of '
            f"100 requests were answered {escape(str(goal))}.</div>"
        )
    elif run.met:
        yield f'<div class="banner good"><b>Objective met:</b> 99 of 100 requests answered {escape(str(goal))}.</div>'
    else:
        which = "" if len(run.steps) == 1 else " at some of the loads"
        yield (
            f'<div class="banner bad"><b>Objective missed{which}:</b> 99 of 100 requests answered {escape(str(goal))}. '
            "Refused and failed requests count as too late.</div>"
        )


def _tiles(result: StepResult, goal: bool) -> str:
    figures = result.figures
    tiles = [(f"{figures.answered:,.1f}/s", f"answered of {figures.offered:,.1f}/s")]
    if goal:
        tiles.append((f"{figures.goodput:,.1f}/s", "within the objective"))
    tiles += [
        (f"{figures.latency.p50_ms:,.2f} ms", "p50"),
        (f"{figures.latency.p99_ms:,.2f} ms", "p99"),
        (f"{figures.refused + figures.failed:,}", "refused or failed"),
    ]
    if figures.mean_batch_size:
        tiles.append((f"{figures.mean_batch_size:.1f}", "rows in a request's batch"))
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for value, name in tiles)
    return f'<div class="tiles">{cells}</div>'


def _table(run: LoadRun) -> str:
    goal = run.conditions.objective is not None
    headings = ["load", "offered/s", "answered/s", *(["goodput/s"] if goal else [])]
    headings += ["p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms", "refused", "failed", "batch", "generator"]
    rows = []
    for result in run.steps:
        figures, latency = result.figures, result.figures.latency
        rates = [figures.offered, figures.answered, *([figures.goodput] if goal else [])]
        times = [latency.p50_ms, latency.p90_ms, latency.p99_ms, latency.p99_9_ms, latency.max_ms]
        rows.append(
            [
                escape(describe(result.step)) + _mark(figures),
                *(f"{rate:,.1f}" for rate in rates),
                *(f"{ms:,.2f}" if latency.count else "–" for ms in times),
                f"{figures.refused:,}",
                f"{figures.failed:,}",
                f"{figures.mean_batch_size:.1f}" if figures.mean_batch_size else "–",
                f"{figures.generator_cores:.0%}",
            ]
        )
    return _html_table(headings, rows)


def _mark(figures: Figures) -> str:
    return {None: "", True: ' <span class="good">met</span>', False: ' <span class="bad">missed</span>'}[figures.met]


def _models(run: LoadRun) -> Iterator[str]:
    if len(run.conditions.models) < 2:
        return
    rows = []
    for result in run.steps:
        judged = {each.model: each for each in result.figures.judged}
        for name, tally in sorted(result.tally.models.items()):
            p50_us, p99_us = tally.latency.percentiles_us((50, 99))
            rate = tally.latency.count / result.step.duration_s
            bad = describe_outcomes(tally.outcomes) or "–"
            rows.append(
                [
                    escape(name),
                    escape(describe(result.step)),
                    f"{rate:,.1f}",
                    f"{p50_us / 1e3:.2f}",
                    f"{p99_us / 1e3:.2f}",
                    _judgement(judged.get(name)),
                    escape(bad),
                ]
            )
    headings = ["model", "load", "answered/s", "p50 ms", "p99 ms", "objective", "not answered"]
    yield "<h2>By model</h2>" + _html_table(headings, rows)


def _judgement(judged: Judged | None) -> str:
    if judged is None:
        return "–"
    said = '<span class="good">met</span>' if judged.met else '<span class="bad">missed</span>'
    return f"{judged.p99_ms:g} ms {said}"


def _server(run: LoadRun) -> Iterator[str]:
    scraped = [(r.step, r.server) for r in run.steps if r.server is not None]
    if not scraped:
        return
    headings = ["load", "cores", "runs/s", "rows/run", "inference ms/run", "queue ms", "preprocessing ms"]
    headings += ["refused", "dropped"]
    rows = [
        [
            escape(describe(step)),
            f"{server.cpu_s / server.seconds:.2f}",
            f"{sum(bucket.runs for bucket in server.batches) / server.seconds:,.1f}",
            f"{server.mean_batch_size:.1f}",
            f"{server.mean_inference_us / 1e3:.2f}",
            f"{server.mean_queue_us / 1e3:.2f}{worst_queue(server)}",
            f"{server.mean_preprocess_us / 1e3:.2f}",
            f"{sum(server.refusals.values()):,}",
            f"{sum(server.dropped.values()):,}",
        ]
        for step, server in scraped
    ]
    yield (
        "<h2>The servers' own view</h2><p class='note'>From /metrics at both ends of each window, other callers' "
        "requests included.</p>"
    )
    if partial := some_of_several(run):
        yield f'<div class="banner warn">{escape(partial[0].upper() + partial[1:])}.</div>'
    yield _html_table(headings, rows)


def _html_table(headings: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
