"""Raw counts: what is in the window, what merges, and what a file carries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rafaga.load import document
from rafaga.load.codecs.base import Wire
from rafaga.load.document import SCHEMA, Conditions, DocumentError, LoadRun, StepResult
from rafaga.load.figures import Figures, GeneratorUse, Objective
from rafaga.load.log import NOT_SENT, Log, LogRows, Reply
from rafaga.load.schedule import Pattern, SchedulePart
from rafaga.load.server_metrics import BatchBucket, ServerWindow
from rafaga.load.steps import Step
from rafaga.load.tally import Tally

STEP = Step(Pattern.POISSON, rate=100.0, warm_up_s=1.0, duration_s=10.0, seed=1)
CONDITIONS = Conditions(Wire.RAFAGA, {"digits": 3.0, "series": 1.0}, "random inputs", 1000.0, 1, 20.0)
MODELS = ["digits", "digits", "series"]


def rows(seed: int = 0, count: int = 1000) -> LogRows:
    """Requests all over the warm-up and the window, some refused, some wrong."""
    rng, log = np.random.default_rng(seed), Log()
    for due_s in np.sort(rng.uniform(-1, 10, count)):
        sent_s = due_s + rng.exponential(1e-4)
        done_s = sent_s + rng.lognormal(-5, 0.5)
        request = int(rng.integers(0, 3))
        match rng.integers(0, 10):
            case 0:
                log.failed(request, due_s, sent_s, done_s, "QUEUE_FULL")
            case 1:
                log.failed(request, due_s, sent_s, sent_s, NOT_SENT)
            case kind:
                right = None if kind < 6 else bool(kind != 9 or due_s < 5)
                log.answered(request, due_s, sent_s, done_s, Reply(200, 50, 3000, int(rng.integers(1, 9)), right))
    return log.take()


def counted(*chunks: LogRows) -> Tally:
    total = Tally(1.0)
    for chunk in chunks:
        total.add(chunk, STEP.duration_s, MODELS)
    return total


def result(total: Tally, *cores: float, server: ServerWindow | None = None) -> StepResult:
    uses = tuple(GeneratorUse(c) for c in cores)
    return StepResult(STEP, Figures.of(STEP, total, uses, CONDITIONS.objective), total, uses, server)


def run(*steps: StepResult, part: SchedulePart | None = None) -> LoadRun:
    return LoadRun(SCHEMA, "0", "2026-01-31T12:00:00+00:00", "there:1", CONDITIONS, part or SchedulePart(), steps)


def test_the_window_is_counted_and_nothing_else() -> None:
    chunk = rows()
    total = counted(chunk)
    due_s = np.frombuffer(chunk.due_s)
    assert total.sent == ((due_s >= 0) & (due_s < 10)).sum()
    assert total.ok == total.latency.count == total.from_send.count == sum(total.batch_sizes.values())
    assert total.unanswered.count == total.sent - total.ok
    assert total.lateness.count == total.sent
    assert sum(m.latency.count for m in total.models.values()) == total.ok
    assert total.models["digits"].latency.count > total.models["series"].latency.count
    assert [sum(i.outcomes.values()) for i in total.intervals] == np.histogram(due_s, np.arange(11))[0].tolist()
    assert 0 < total.wrong < total.checked < total.ok


def test_a_document_comes_back_as_it_was() -> None:
    server = ServerWindow(10.0, 4.5, (BatchBucket(1, 5), BatchBucket(None, 2)), 1.5, 1.0, 2.0, 3.0, {"OK": 7}, {}, {})
    written = run(result(counted(rows()), 0.5, server=server))
    text = document.encode(written)
    read = document.decode(text, "a.json")
    assert document.encode(read) == text
    assert read.steps[0].figures == written.steps[0].figures
    assert read.steps[0].server == server
    assert read.met is False
    assert read.wrong > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not a result of rafaga load"),
        (b"[]", "not a result of rafaga load"),
        (document.encode(run(result(counted(rows())))).replace(b'"latency": "H', b'"latency": "!'), "HDR histogram"),
        (document.encode(replace(run(), schema=99)), "schema 99"),
    ],
)
def test_an_invalid_document_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(DocumentError, match=r"other\.json") as raised:
        document.decode(text, "other.json")
    assert message in str(raised.value)


def test_parts_of_one_run_are_merged() -> None:
    chunks = [rows(seed) for seed in range(3)]
    parts = [run(result(counted(chunk), 0.1 * (i + 1)), part=SchedulePart(i, 3)) for i, chunk in enumerate(chunks)]
    merged = document.merge([parts[2], parts[0], parts[1]])
    assert merged.part == SchedulePart()
    assert merged.steps[0].tally.latency.encode() == counted(*chunks).latency.encode()
    assert merged.steps[0].figures.generator_cores == pytest.approx(0.3)
    assert len(merged.steps[0].generators) == 3
    assert merged.steps[0].figures.answered == pytest.approx(sum(p.steps[0].figures.answered for p in parts))
    other = replace(parts[1], conditions=replace(CONDITIONS, seed=9))
    for wrong, message in (
        ([parts[0], parts[2]], "missing: part 2/3"),
        ([parts[0], parts[0], parts[2]], "part 1/3 is there twice"),
        ([parts[0], other, parts[2]], "different runs"),
    ):
        with pytest.raises(DocumentError, match=message):
            document.merge(wrong)


def test_every_model_is_judged_by_itself() -> None:
    """One request in fifty is of the slow model: in the mix it would hardly show."""
    log = Log()
    for i in range(1000):
        slow = i % 50 == 0
        log.answered(2 if slow else 0, i / 100, i / 100, i / 100 + (0.1 if slow else 0.001), Reply())
    total = counted(log.take())
    objectives = Objective(50.0), Objective(50.0, {"series": 200.0}), Objective(None, {"series": 50.0})
    figures = [Figures.of(STEP, total, (), objective) for objective in objectives]
    both, _, only = ([(j.model, j.p99_ms, j.due, j.within) for j in each.judged] for each in figures)
    assert both == [("digits", 50.0, 980, 980), *only]
    assert only == [("series", 50.0, 20, 0)]
    assert [each.met for each in figures] == [False, True, False]
    assert [each.goodput for each in figures] == pytest.approx([98.0, 100.0, 98.0])
