"""Progress while a run goes on, for terminals and for logs."""

from __future__ import annotations

import io
import time

import pytest

from rafaga.load.figures import Figures
from rafaga.load.log import Log, Reply
from rafaga.load.schedule import Pattern
from rafaga.load.steps import Step
from rafaga.load.tally import Tally
from rafaga.load.view import LineView, LiveView, NoView, Progress, ProgressTracker, view

STEP = Step(Pattern.POISSON, rate=1234.5, warm_up_s=2, duration_s=10)


def test_progress_is_of_the_last_second() -> None:
    log = Log()
    for second, latency_s in ((1.0, 5.0), (9.8, 0.010), (9.9, 0.020)):
        log.answered(0, second - latency_s, 0.0, second, Reply())
        log.failed(0, second, second, second, "QUEUE_FULL")
        log.failed(0, second, second, second, "ENGINE_FAILURE")
    others, rows = Log(), log.take()
    others.answered(0, 0.0, 0.0, 1.0, Reply())
    watch = ProgressTracker(begin_s=time.monotonic() - 10)
    watch.add(others.take())
    watch.add(rows)
    watch.add(others.take())
    progress = watch.progress()
    assert progress.at_s == pytest.approx(10, abs=1)
    assert (progress.ok, progress.refused, progress.failed) == (4, 3, 3)
    assert progress.recent_rate == 3, "the chunk of the first second is left out"


def shown(stream: io.StringIO, which: type[LineView] | type[LiveView]) -> str:
    with which(stream) as each:
        each.note("looking")
        for at in (-1.0, 5.0, 11.0):
            each.update(STEP, Progress(at, 10, 2, 1, 100.0, 1.5, 20.25))
        each.done(STEP, Figures.of(STEP, Tally(1.0), (), None), {"OK": 1, "QUEUE_FULL": 2})
    return stream.getvalue()


def test_a_log_gets_a_line_per_step_and_now_and_then_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(io.StringIO(), LineView).splitlines()
    assert (lines[0], lines[1][:17], lines[1][-14:]) == ("looking", "1,234/s poisson: ", "; QUEUE_FULL 2")
    monkeypatch.setattr("rafaga.load.view._LINE_EVERY_S", 0.0)
    lines = shown(io.StringIO(), LineView).splitlines()
    assert "warming up 1 s, 100 answers/s, p50 1.50 ms, p99 20.25 ms, 2 refused, 1 failed" in lines[1]
    assert "5 of 10 s" in lines[2]
    assert "waiting for the last answers" in lines[3]


def test_a_terminal_gets_a_live_view() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(view(Terminal()), LiveView)
    assert isinstance(view(io.StringIO()), LineView)
    assert isinstance(view(Terminal(), quiet=True), NoView)
    text = shown(Terminal(), LiveView)
    for part in ("looking", "1,234/s poisson", "answers/s", "20.25", "QUEUE_FULL 2"):
        assert part in text
