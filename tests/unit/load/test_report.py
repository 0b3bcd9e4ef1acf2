"""The page and the table: everything that happened is on them, and nothing from outside."""

from __future__ import annotations

import functools
import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from rafaga.load.document import LoadRun
from rafaga.load.figures import Figures, GeneratorUse
from rafaga.load.log import Log
from rafaga.load.report import page
from rafaga.load.schedule import Pattern
from rafaga.load.server_metrics import BatchBucket, ServerWindow
from rafaga.load.steps import Step
from rafaga.load.tally import Tally
from rafaga.load.text import show
from tests.html import Page
from tests.unit.load.test_tally import CONDITIONS, StepResult, counted, result, rows, run

BATCHES = (BatchBucket(1, 5), BatchBucket(4, 9), BatchBucket(None, 0))
SERVER = ServerWindow(10.0, 4.5, BATCHES, 1.5, 10.0, 0.0, 900.0, {"OK": 7}, {}, {})
HEADINGS = ("Latency against throughput", "Over time", "Distribution", "Batches", "Where the time went", "Refused and")


@functools.cache
def ramp() -> LoadRun:
    def at(rate: float) -> StepResult:
        return replace(result(counted(rows(int(rate), int(rate * 10))), 0.9, server=SERVER), step=step(rate))

    def step(rate: float) -> Step:
        return Step(Pattern.POISSON, rate=rate, duration_s=10.0)

    return run(*map(at, (20.0, 40.0, 80.0)))


def test_a_ramp_has_every_plot_on_a_page_that_stands_alone() -> None:
    html = page.render(replace(ramp(), max_rate=40.0))
    parsed = Page(html)
    assert parsed.tags.count("svg") == len(HEADINGS)
    facts = ("QUEUE_FULL", "NOT_SENT", "40/s poisson", "90% of a core", "answers were wrong", "own view")
    for text in (*HEADINGS, *facts, "40.0 requests/s"):
        assert text in html
    assert not re.search(r"<(script|link|img|iframe)", html)
    assert not re.search(r'(?:href|src)="[^#"]|url\([^#]', html), "links"
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(parsed.ids)


def test_names_cannot_break_the_page() -> None:
    conditions = replace(CONDITIONS, models={"<b>&": 1.0})
    html = page.render(replace(run(result(counted(rows()))), conditions=conditions, server="<script>"))
    assert "<script>" not in html
    Page(html)


@pytest.mark.parametrize("pattern", [Pattern.CLOSED, Pattern.TRACE])
def test_a_run_without_answers_has_a_page_too(pattern: Pattern) -> None:
    log = Log()
    log.failed(0, 0.5, 0.5, 0.6, "SERVER_UNREACHABLE")
    step = Step(pattern, rate=1.0, callers=int(pattern is Pattern.CLOSED), duration_s=10.0)
    total = Tally(1.0)
    total.add(log.take(), 10.0, ["digits"])
    figures = Figures.of(step, total, (GeneratorUse(0.0),), CONDITIONS.objective)
    html = page.render(run(StepResult(step, figures, total, (GeneratorUse(0.0),))))
    assert "SERVER_UNREACHABLE" in html
    Page(html)


def shown(load: LoadRun) -> str:
    out = io.StringIO()
    show(load, Console(file=out, width=200))
    return out.getvalue()


def test_the_table_has_every_step_and_its_verdict() -> None:
    text = shown(ramp())
    assert len(re.findall(r"^ \d+/s poisson (missed|met) ", text, re.MULTILINE)) == 3
    for part in ("digits: ", "QUEUE_FULL", "WRONG", "90% of a core", "objective missed", "/metrics: 0.45 cores"):
        assert part in text


def test_a_search_that_saw_no_miss_says_so() -> None:
    unbounded = replace(ramp(), max_rate=80.0)
    text = shown(unbounded)
    assert "at least 80.0 requests/s with p99 within 20 ms: the search ended before a miss" in text
    for said in (text, page.render(unbounded)):
        assert "the search ended before a miss" in said
        assert "is the highest rate" not in said
