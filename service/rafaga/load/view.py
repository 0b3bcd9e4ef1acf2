"""Progress of a run: a live table on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TextIO

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.table import Table

from rafaga.load.figures import REFUSALS, Figures, describe_outcomes
from rafaga.load.log import OK, LogRows
from rafaga.load.schedule import Pattern
from rafaga.load.steps import Step

_LINE_EVERY_S = 5.0
_RECENT_S = 1.0


@dataclass(frozen=True)
class Progress:
    """at_s: relative to the window's start, negative while warming up. Rates and latencies are of the last second."""

    at_s: float
    ok: int
    refused: int
    failed: int
    recent_rate: float
    recent_p50_ms: float
    recent_p99_ms: float


class ProgressTracker:
    """Progress, from the rows on their way to the tally. Includes the warm-up."""

    def __init__(self, begin_s: float) -> None:
        self._begin_s = begin_s
        self._outcomes: dict[str, int] = {}
        self._recent: deque[tuple[float, NDArray[np.float64]]] = deque()

    def add(self, rows: LogRows) -> None:
        outcome = np.frombuffer(rows.outcome, np.uint16)
        for reason, count in zip(rows.reasons, np.bincount(outcome, minlength=len(rows.reasons)).tolist(), strict=True):
            self._outcomes[reason] = self._outcomes.get(reason, 0) + count
        ok = outcome == 0
        done_s = np.frombuffer(rows.done_s)[ok]
        if done_s.size:
            self._recent.append((float(done_s.max()), done_s - np.frombuffer(rows.due_s)[ok]))

    def progress(self) -> Progress:
        now_s = time.monotonic() - self._begin_s
        while self._recent and self._recent[0][0] < now_s - _RECENT_S:
            self._recent.popleft()
        latencies = np.concatenate([each for _, each in self._recent]) if self._recent else np.zeros(0)
        p50_s, p99_s = np.percentile(latencies, (50, 99)) if latencies.size else (0.0, 0.0)
        ok = self._outcomes.get(OK, 0)
        refused = sum(n for reason, n in self._outcomes.items() if reason in REFUSALS)
        failed = sum(self._outcomes.values()) - ok - refused
        rate = latencies.size / _RECENT_S
        return Progress(now_s, ok, refused, failed, rate, float(p50_s) * 1e3, float(p99_s) * 1e3)


class View(Protocol):
    def __enter__(self) -> View: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def note(self, text: str) -> None:
        """A message to show on a line of its own."""

    def update(self, step: Step, progress: Progress) -> None:
        """Several times a second while a step runs."""

    def done(self, step: Step, figures: Figures, outcomes: dict[str, int]) -> None:
        """A step has ended."""


def describe(step: Step) -> str:
    """ "500/s poisson" or "32 callers"."""
    if step.pattern is Pattern.CLOSED:
        return f"{step.callers} caller{'s' if step.callers > 1 else ''}"
    return f"{step.rate:,.4g}/s {step.pattern}"


def view(stream: TextIO, quiet: bool = False) -> View:
    if quiet:
        return NoView()
    return LiveView(stream) if stream.isatty() else LineView(stream)


class NoView:
    """Shows nothing: a log then contains only the result."""

    def __enter__(self) -> NoView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def note(self, text: str) -> None: ...

    def update(self, step: Step, progress: Progress) -> None: ...

    def done(self, step: Step, figures: Figures, outcomes: dict[str, int]) -> None: ...


class LineView:
    """For logs: a line every few seconds and one per step."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown_s = time.monotonic()

    def __enter__(self) -> LineView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def update(self, step: Step, progress: Progress) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s >= _LINE_EVERY_S:
            self._shown_s = now_s
            self.note(
                f"{describe(step)}: {_phase(step, progress)}, {progress.recent_rate:,.0f} answers/s, "
                f"p50 {progress.recent_p50_ms:.2f} ms, p99 {progress.recent_p99_ms:.2f} ms, "
                f"{progress.refused} refused, {progress.failed} failed"
            )

    def done(self, step: Step, figures: Figures, outcomes: dict[str, int]) -> None:
        self.note(_result(step, figures, outcomes))


class LiveView:
    """For people: the finished steps, and below them the running one."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def update(self, step: Step, progress: Progress) -> None:
        table = Table.grid(padding=(0, 2))
        for _ in range(7):
            table.add_column(justify="right")
        table.add_row(
            f"[bold]{describe(step)}[/]", "", "answers/s", "p50 ms", "p99 ms", "refused", "failed", style="dim"
        )
        table.add_row(
            _bar(step, progress),
            _phase(step, progress),
            f"{progress.recent_rate:,.0f}",
            f"{progress.recent_p50_ms:.2f}",
            f"{progress.recent_p99_ms:.2f}",
            f"[yellow]{progress.refused:,}[/]" if progress.refused else "0",
            f"[red]{progress.failed:,}[/]" if progress.failed else "0",
        )
        self._live.update(table)

    def done(self, step: Step, figures: Figures, outcomes: dict[str, int]) -> None:
        self.note(_result(step, figures, outcomes))


def _result(step: Step, figures: Figures, outcomes: dict[str, int]) -> str:
    latency = figures.latency
    line = (
        f"{describe(step)}: {figures.answered:,.1f} answers/s, p50 {latency.p50_ms:.2f} ms, p99 {latency.p99_ms:.2f} ms"
    )
    verdict = {None: "", True: ", objective met", False: ", objective missed"}[figures.met]
    bad = describe_outcomes(outcomes)
    return line + verdict + (f"; {bad}" if bad else "")


def _phase(step: Step, progress: Progress) -> str:
    if progress.at_s < 0:
        return f"warming up {-progress.at_s:.0f} s"
    if progress.at_s > step.duration_s:
        return "waiting for the last answers"
    return f"{progress.at_s:.0f} of {step.duration_s:g} s"


def _bar(step: Step, progress: Progress, width: int = 24) -> str:
    whole = step.warm_up_s + step.duration_s
    filled = round(width * min(1.0, max(0.0, (progress.at_s + step.warm_up_s) / whole)))
    return f"[cyan]{'━' * filled}[/][dim]{'━' * (width - filled)}[/]"
