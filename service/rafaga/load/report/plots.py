"""The plots of the page. Each takes a run and returns an SVG element, or an empty text if the run has no data for
it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from rafaga.load.document import LoadRun, StepResult
from rafaga.load.figures import Figures
from rafaga.load.log import OK
from rafaga.load.view import describe

_INK, _MUTED, _GRID = "#1e293b", "#64748b", "#e2e8f0"
_BLUE, _TEAL, _AMBER, _RED, _GREY = "#2563eb", "#0d9488", "#d97706", "#dc2626", "#94a3b8"
# Of reasons and phases; they differ in lightness too.
_PARTS = ("#1d4ed8", "#0d9488", "#f59e0b", "#dc2626", "#7c3aed", "#64748b", "#be185d", "#65a30d")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and the page's fonts draw it
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}
_WIDTH = 9.6
_PERCENTILES = ((50.0, "p50", _BLUE), (99.0, "p99", _AMBER), (99.9, "p99.9", _RED))


def latency_against_throughput(run: LoadRun) -> str:
    """How latency and goodput answer to the offered rate. Needs at least two rates."""
    results = sorted((r for r in run.steps if r.step.open), key=lambda r: r.step.rate)
    if len(results) < 2:
        return ""
    with mpl.rc_context(_STYLE):
        figure, (left, right) = _panels(2, 3.6)
        offered = [r.figures.offered for r in results]
        for level, label, colour in _PERCENTILES:
            values = [r.tally.latency.percentiles_us([level])[0] / 1e3 for r in results]
            answered = [(x, y) for x, y, r in zip(offered, values, results, strict=True) if r.tally.ok]
            left.plot([x for x, _ in answered], [y for _, y in answered], "o-", color=colour, label=label)
        _objective(left, run)
        _thousands(left)
        _log_milliseconds(left)
        left.set(title="Latency", xlabel="offered, requests/s", ylabel="latency, ms")
        left.legend(loc="best", fontsize=9)
        right.plot(offered, offered, color=_GREY, linestyle=":", label="offered")
        right.plot(offered, [r.figures.answered for r in results], "o-", color=_TEAL, label="answered")
        if run.conditions.objective is not None:
            goodput = [r.figures.goodput for r in results]
            right.plot(offered, goodput, "o-", color=_BLUE, label="within the objective")
        right.set(title="Throughput", xlabel="offered, requests/s", ylabel="requests/s")
        right.set_ylim(bottom=0)
        _thousands(right)
        right.legend(loc="best", fontsize=9)
        return _svg(figure, "throughput")


def over_time(run: LoadRun) -> str:
    """Percentiles and rates of every interval, the steps one after the other."""
    if not run.answered:
        return ""
    with mpl.rc_context(_STYLE):
        figure, (top, bottom) = _panels(2, 5.2, stacked=True)
        at_s = 0.0
        bad = sorted({reason for r in run.steps for reason in r.tally.outcomes} - {OK})
        for result in run.steps:
            _step_over_time(top, bottom, result, at_s, bad)
            at_s += result.step.duration_s
            if result is not run.steps[-1]:
                for axes in (top, bottom):
                    axes.axvline(at_s, color=_MUTED, linewidth=0.8, linestyle=":")
        _objective(top, run)
        _log_milliseconds(top)
        top.set(title="Latency of requests by when they were due", ylabel="latency, ms")
        bottom.set(title="What became of them", xlabel="time measured, s", ylabel="requests/s")
        for axes in (top, bottom):
            axes.set_xlim(0, at_s)
            _legend_beside(axes)
        bottom.set_ylim(bottom=0)
        _thousands(bottom)
        return _svg(figure, "time")


def _step_over_time(top: Axes, bottom: Axes, result: StepResult, begin_s: float, bad: Sequence[str]) -> None:
    intervals, width_s = result.tally.intervals, result.tally.interval_s
    # The last slice may be shorter than the others.
    ends_s = np.minimum((np.arange(len(intervals)) + 1) * width_s, result.step.duration_s)
    widths_s = np.diff(ends_s, prepend=0.0)
    middles_s = begin_s + ends_s - widths_s / 2
    answered = np.array([interval.latency.count > 0 for interval in intervals], bool)
    for level, label, colour in ((50.0, "p50", _BLUE), (99.0, "p99", _AMBER), (100.0, "max", _RED)):
        # With few requests the p99 is the maximum: the broader line is drawn below, so that both are visible.
        width = 3.0 if label == "p99" else 1.4
        values = np.array([i.latency.percentiles_us([level])[0] / 1e3 for i in intervals])
        values = np.where(answered, values, np.nan)
        marker = "o" if len(intervals) < 3 else ""
        top.plot(middles_s, values, color=colour, label=label, marker=marker, linewidth=width)
    below = np.zeros(len(intervals))
    for reason, colour in ((OK, "#93c5fd"), *zip(bad, _cycle(_PARTS[2:]), strict=False)):
        rates = np.array([i.outcomes.get(reason, 0) for i in intervals]) / widths_s
        if reason == OK or rates.any():
            label = "answered" if reason == OK else reason
            bottom.bar(middles_s, rates, widths_s, bottom=below, color=colour, label=label, linewidth=0)
        below += rates


def distribution(run: LoadRun) -> str:
    """The whole distribution, stretched towards its tail."""
    results = [r for r in run.steps if r.tally.ok]
    if not results:
        return ""
    with mpl.rc_context(_STYLE):
        figure, (axes,) = _panels(1, 3.8)
        colours = [_BLUE] if len(results) == 1 else list(mpl.colormaps["viridis_r"](np.linspace(0.15, 1, len(results))))
        nines = max(1.0, max(np.log10(r.tally.ok) for r in results))
        for result, colour in zip(results, colours, strict=True):
            x = np.linspace(0, np.log10(result.tally.ok), 200)
            levels = (100 * (1 - 10.0**-x)).tolist()
            label = "from when due" if len(results) == 1 else describe(result.step)
            axes.plot(x, _milliseconds(result.tally.latency.percentiles_us(levels)), color=colour, label=label)
            if len(results) == 1 and result.step.open:
                sent = _milliseconds(result.tally.from_send.percentiles_us(levels))
                axes.plot(x, sent, color=_GREY, linestyle="--", label="from when sent")
        _objective(axes, run)
        if run.conditions.objective is not None:
            axes.axvline(2, color=_INK, linewidth=1, linestyle=":")
        ticks = [0, np.log10(2), *range(1, int(nines) + 1)]
        axes.set_xticks(ticks, ["0", "50", *(f"{100 * (1 - 10.0**-n):.{max(0, n - 2)}f}" for n in ticks[2:])])
        _log_milliseconds(axes)
        axes.set(
            title="Latency by percentile", xlabel="percentile of the answers", ylabel="latency, ms", xlim=(0, nines)
        )
        _legend_beside(axes)
        return _svg(figure, "distribution")


def batch_sizes(run: LoadRun) -> str:
    """How many rows shared a run of the engine, from the replies and from the server's metrics."""
    told = [r for r in run.steps if r.tally.batch_sizes]
    scraped = [r for r in run.steps if r.server is not None and any(b.runs for b in r.server.batches)]
    panels = [bool(told), bool(scraped), len(told) > 1]
    if not any(panels):
        return ""
    with mpl.rc_context(_STYLE):
        figure, axes = _panels(sum(panels), 3.2)
        place = iter(axes)
        if told:
            _told_sizes(next(place), told)
        if scraped:
            _scraped_sizes(next(place), scraped)
        if len(told) > 1:
            panel = next(place)
            if all(r.step.open for r in told):
                told = sorted(told, key=lambda r: r.figures.offered)
            x = [r.figures.offered for r in told]
            panel.plot(x, [r.figures.mean_batch_size for r in told], "o-", color=_BLUE)
            panel.set(title="By load", xlabel="offered, requests/s", ylabel="mean rows a request shared")
            panel.set_ylim(bottom=0)
            _thousands(panel)
        return _svg(figure, "batches")


def _told_sizes(axes: Axes, results: Sequence[StepResult]) -> None:
    totals: dict[int, int] = {}
    for result in results:
        for size, count in result.tally.batch_sizes.items():
            totals[size] = totals.get(size, 0) + count
    sizes = sorted(totals)
    axes.bar(sizes, _shares([totals[size] for size in sizes]), color=_BLUE)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(title="From the replies", xlabel="rows in the request's batch", ylabel="% of requests")


def _scraped_sizes(axes: Axes, results: Sequence[StepResult]) -> None:
    totals: dict[int | None, int] = {}
    for result in results:
        for bucket in result.server.batches if result.server else ():
            totals[bucket.up_to] = totals.get(bucket.up_to, 0) + bucket.runs
    bounds = list(totals)
    while bounds and not totals[bounds[-1]]:
        bounds.pop()
    names = []
    for below, bound in zip([0, *bounds], bounds, strict=False):
        first = (below or 0) + 1
        names.append(f"{first}+" if bound is None else str(bound) if bound == first else f"{first}–{bound}")
    axes.bar(names, _shares([totals[bound] for bound in bounds]), color=_TEAL)
    axes.tick_params(axis="x", labelsize=8)
    axes.set(title="From /metrics", xlabel="rows in a run of the engine", ylabel="% of runs")


@dataclass(frozen=True)
class _ServerTime:
    """Where the server's part of a request's time went: means, in milliseconds."""

    queue_ms: float
    preprocess_ms: float
    inference_ms: float

    @classmethod
    def of(cls, result: StepResult) -> _ServerTime | None:
        """From the replies, or else from /metrics, where inference is the time of an engine's run; None if neither has
        it."""
        figures, server = result.figures, result.server
        if figures.queue.count:
            return cls(figures.queue.mean_ms, figures.preprocess.mean_ms, figures.inference.mean_ms)
        if server is not None and any(bucket.runs for bucket in server.batches):
            return cls(server.mean_queue_us / 1e3, server.mean_preprocess_us / 1e3, server.mean_inference_us / 1e3)
        return None


def breakdown(run: LoadRun) -> str:
    """Where the mean latency of an answer went, per step."""
    told = [(r, time) for r in run.steps if r.tally.ok and (time := _ServerTime.of(r)) is not None]
    if not told:
        return ""
    results, times = [r for r, _ in told], [time for _, time in told]
    with mpl.rc_context(_STYLE):
        figure, (axes,) = _panels(1, 1.4 + 0.36 * len(results))
        names = [describe(r.step) for r in results]
        phases = {
            "sent late (generator)": [max(0.0, f.latency.mean_ms - f.from_send.mean_ms) for f in _figures(results)],
            "queue": [time.queue_ms for time in times],
            "preprocessing": [time.preprocess_ms for time in times],
            "inference": [time.inference_ms for time in times],
        }
        known = np.sum(list(phases.values()), axis=0)
        whole = np.array([f.latency.mean_ms for f in _figures(results)])
        phases["network, gRPC and the rest"] = np.maximum(0.0, whole - known).tolist()
        left = np.zeros(len(results))
        for (name, values), colour in zip(phases.items(), (_RED, _AMBER, _TEAL, _BLUE, _GREY), strict=True):
            axes.barh(names, values, left=left, color=colour, label=name, height=0.62)
            left += values
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.set(title="Mean latency of an answer", xlabel="latency, ms")
        figure.legend(loc="outside lower center", ncols=5, fontsize=9)
        return _svg(figure, "breakdown")


def failures(run: LoadRun) -> str:
    """Refusals and failures by reason, as shares of what was due in each step."""
    reasons = sorted({reason for r in run.steps for reason in r.tally.outcomes} - {OK})
    if not reasons:
        return ""
    results = [r for r in run.steps if r.tally.sent]
    with mpl.rc_context(_STYLE):
        figure, (axes,) = _panels(1, 1.4 + 0.36 * len(results))
        names, left = [describe(r.step) for r in results], np.zeros(len(results))
        for reason, colour in zip(reasons, _cycle(_PARTS[2:]), strict=False):
            shares = np.array([100 * r.tally.outcomes.get(reason, 0) / r.tally.sent for r in results])
            axes.barh(names, shares, left=left, color=colour, label=reason, height=0.62)
            left += shares
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.set(title="Requests without an answer", xlabel="% of those that were due")
        figure.legend(loc="outside lower center", ncols=4, fontsize=9)
        return _svg(figure, "failures")


def _figures(results: Sequence[StepResult]) -> list[Figures]:
    return [r.figures for r in results]


def _thousands(axes: Axes) -> None:
    """Formats 1500 as 1,500, as on the rest of the page."""
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.yaxis.set_major_formatter("{x:,.10g}")


def _panels(count: int, height: float, stacked: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    grid = figure.subplots(*((count, 1) if stacked else (1, count)), squeeze=False, sharex=stacked)
    return figure, list(np.ravel(grid))


def _objective(axes: Axes, run: LoadRun) -> None:
    if (goal := run.conditions.objective) is None:
        return
    if goal.p99_ms is not None:
        axes.axhline(goal.p99_ms, color=_INK, linewidth=1, linestyle=":", label="objective (p99)")
    for name, p99_ms in goal.by_model.items():
        axes.axhline(p99_ms, color=_MUTED, linewidth=1, linestyle=":", label=f"objective of {name}")


def _log_milliseconds(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter("{x:,.10g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend_beside(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)


def _milliseconds(values_us: Sequence[float]) -> NDArray[np.float64]:
    """Without zeros, which a logarithmic axis cannot show."""
    return np.maximum(np.asarray(values_us, np.float64), 1.0) / np.float64(1e3)


def _shares(counts: Sequence[int]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = 100 * np.asarray(counts) / max(1, sum(counts))
    return shares


def _cycle(colours: Sequence[str]) -> Iterable[str]:
    while True:
        yield from colours


def _svg(figure: Figure, name: str) -> str:
    """Only the SVG element. name: prefix that makes its ids unique on the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, **_STYLE}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
