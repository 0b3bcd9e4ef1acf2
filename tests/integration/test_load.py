"""`rafaga load` against real servers: what is sent, what is counted, what is written, and the exit codes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rafaga.cli import main
from rafaga.errors import ServerUnreachable
from rafaga.load import command, document, mlperf, targets
from rafaga.load.codecs.base import Request, Target, Wire
from rafaga.load.connection import Connection
from rafaga.load.document import LoadRun
from rafaga.load.fleet import Fleet, FleetError
from rafaga.load.generator import CallFailed
from rafaga.load.log import OK
from rafaga.load.payloads import RANDOM_PAYLOADS, Payloads
from rafaga.load.report import page
from rafaga.load.schedule import Pattern, SchedulePart
from rafaga.load.steps import Step
from rafaga.load.transport import GrpcSend
from rafaga.load.worker import Setup
from tests import bundles
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, Served, serving
from tests.integration.valve import Pace

QUICK = ["--duration", "0.6", "--warm-up", "0.2"]
# Callers that wait send nothing while the machine stands still: no stall may hide in a warm-up, or fill the window.
CLOSED = ["--duration", "1", "--warm-up", "0"]


Load = Callable[..., tuple[int, LoadRun]]
Judge = Callable[..., tuple[int, Any]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Runs the command against a server; gives the exit code and what --json wrote."""

    def run(served: Served, *arguments: str) -> tuple[int, LoadRun]:
        path = tmp_path / "run.json"
        code = main(["load", "--server", served.address, "--json", str(path), *QUICK, *arguments])
        return code, document.read(path)

    return run


def prepared(served: Served, *models: str) -> tuple[Target, ...]:
    return targets.prepare(Connection(served.address), Wire.RAFAGA, dict.fromkeys(models, 1.0), Payloads(), PATIENCE_S)


def test_an_open_loop_sends_its_schedule_and_reports_everything(
    server: Served, load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    """1. Poisson arrivals over rafaga.v1. 2. Every request of the window is answered, some checked. 3. The replies
    show where the time went, and so does /metrics."""
    metrics = f"{server.http}/metrics"
    code, run = load(server, "--model", "digits", "--rate", "100", "--check-every", "2", "--metrics", metrics)
    assert code == 0
    (step,) = run.steps
    due = [at for at in step.step.schedule([1.0]).due_s if 0 <= at < step.step.duration_s]
    assert step.tally.outcomes == {OK: len(due)}
    assert step.tally.checked > 10
    assert step.tally.wrong == 0
    assert step.tally.queue.count == step.tally.inference.count == len(due)
    assert sum(step.tally.batch_sizes.values()) == len(due)
    assert step.figures.latency.p50_ms >= step.figures.inference.p50_ms
    assert step.server is not None
    assert sum(bucket.runs for bucket in step.server.batches) > 0
    assert step.server.mean_inference_us > 0
    assert (run.server, run.part, run.met) == (server.address, SchedulePart(), None)
    captured = capsys.readouterr()
    assert "100/s poisson" in captured.out
    assert "answers checked, all as expected" in captured.out
    assert captured.err.startswith("100/s poisson: "), "no terminal, hence lines"


def test_a_mix_over_open_inference_in_two_processes_to_two_addresses(
    server: Served, load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    """Replies of this protocol say nothing of where the time went; /metrics, of one of the servers, does."""
    code, run = load(
        server,
        *["--model", "digits=2", "--model", "series", "--model", "backbone", "--size", "32x48"],
        *["--protocol", "open-inference", "--rate", "80", "--processes", "2"],
        *["--server", f"{server.address},{server.address}", "--metrics", f"{server.http}/metrics"],
    )
    assert (code, run.addresses) == (0, 2)
    (step,) = run.steps
    assert set(step.tally.models) == {"digits", "series", "backbone"}
    assert set(step.tally.outcomes) == {OK}
    assert step.tally.wrong == step.tally.queue.count == 0
    assert len(step.generators) == 2
    assert step.server is not None
    out = capsys.readouterr().out
    assert f"queue {step.server.mean_queue_us / 1e3:.2f} ms, preprocessing" in out
    assert "warning: 2 addresses shared the calls" in out
    assert "Where the time went" in page.render(run)


def test_callers_that_wait_and_a_mix_of_files_over_rafaga(server: Served, load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(messages.png(messages.random_digits(i)[0, :, :, 0]))
    (folder / "history.csv").write_text("day,value\n" + "\n".join(f"{i},{i / 7}" for i in range(30)))
    models = ["--model", "digits", "--model", "series", "--model", "backbone"]
    code, run = load(server, *models, "--input", str(folder), "--column", "value", "--concurrency", "4", *CLOSED)
    assert (code, run.conditions.payload) == (0, "3 images, 1 series")
    (step,) = run.steps
    assert (step.step.pattern, step.step.callers) == (Pattern.CLOSED, 4)
    assert set(step.tally.models) == {"digits", "series", "backbone"}
    assert set(step.tally.outcomes) == {OK}
    assert step.tally.preprocess.max_us > 0, "files are decoded by the server"
    assert not any("late" in warning for warning in step.figures.warnings), "without a schedule there is no lateness"


@pytest.mark.parametrize("protocol", ["rafaga", "open-inference"])
def test_every_task_can_be_loaded(tmp_path: Path, load: Load, protocol: str) -> None:
    """Objects, segments, next symbols and forecasts with covariates (those over rafaga.v1) as well, all answers
    checked."""
    root, names = tmp_path / "repository", {"detector", "segmenter", "letters"}
    bundles.publish_detector(root)
    bundles.publish_segmenter(root)
    bundles.publish_sequence_model(root)
    if protocol == "rafaga":
        bundles.publish_forecaster_with_covariates(root)
        names.add("sales")
    with serving(root) as served:
        arguments = [word for name in names for word in ("--model", name)]
        callers = ["--concurrency", "2", *CLOSED]
        code, run = load(served, *arguments, "--protocol", protocol, "--check-every", "1", *callers)
    assert code == 0
    (step,) = run.steps
    assert set(step.tally.models) == names
    assert set(step.tally.outcomes) == {OK}
    assert (step.tally.checked, step.tally.wrong) == (step.tally.ok, 0)


def test_a_ramp_goes_step_by_step_and_an_objective_decides_the_exit_code(server: Served, load: Load) -> None:
    ramp = ["--model", "digits", "--ramp", "20:60:2", "--arrivals", "constant", "--duration", "0.4"]
    code, run = load(server, *ramp, "--slo-p99-ms", "60000")
    assert (code, run.met) == (0, True)
    assert [(r.step.rate, r.tally.sent) for r in run.steps] == [(20, 8), (60, 24)]
    code, run = load(server, *ramp, "--slo-p99-ms", "0.001")
    assert (code, run.met, run.steps[0].figures.goodput) == (1, False, 0)


def test_two_machines_share_a_run(server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1. Each sends its part and writes its raw counts. 2. Merged, they are the whole schedule, each request once."""
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    common = ["load", "--server", server.address, "--model", "digits", "--rate", "60", *QUICK]
    for i, file in enumerate(files):
        assert main([*common, "--part", f"{i + 1}/2", "--json", str(file)]) == 0
    whole = tmp_path / "whole.json"
    merge = ["load", "merge", *map(str, files), "--json", str(whole)]
    assert main([*merge, "--slo-p99-ms", "60000"]) == 0
    merged = document.read(whole)
    step = merged.steps[0].step
    due = step.schedule([1.0]).due_s
    assert merged.steps[0].tally.sent == ((due >= 0) & (due < step.duration_s)).sum()
    assert len(merged.steps[0].generators) == 2
    assert merged.met is True
    assert main([*merge, "--slo-p99-ms", "0.001"]) == 1
    assert main(["load", "merge", str(files[0])]) == 2
    assert "missing: part 2/2" in capsys.readouterr().err


FIND = ["--find-max", "--slo-p99-ms", "60000", "--duration", "0.2", "--warm-up", "0", "--arrivals", "constant"]


def test_the_highest_rate_is_found(tmp_path: Path, load: Load) -> None:
    """The rate is doubled until too much is due for a server of 20 ms per row: it refuses what more than two wait
    before."""
    bundles.publish_classifier(tmp_path / "repository")
    with serving(tmp_path / "repository", Pace(0.02).load, max_batch_size=1, max_queue_requests=2) as served:
        code, run = load(served, "--model", "digits", *FIND, "--rate", "5", "--precision", "100")
    assert code == 0
    assert (run.max_rate or 0) >= 10
    assert [r.step.rate for r in run.steps] == [5 * 2**n for n in range(len(run.steps))]
    assert [r.figures.met for r in run.steps] == [True] * (len(run.steps) - 1) + [False]


def test_a_search_without_a_guess_makes_one(server: Served, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_PROBE", replace(command._PROBE, warm_up_s=0.0, duration_s=0.3))
    arguments = ["--find-max", "--slo-p99-ms", "0.001", "--duration", "0.1", "--warm-up", "0", "--deadline-ms", "50"]
    code, run = load(server, "--model", "digits", *arguments)
    assert (code, run.max_rate) == (1, 0)
    assert min(r.step.rate for r in run.steps if r.step.open) == 50, "down to five requests in a step"


def test_a_trace_says_which_model_gets_how_many_rows(server: Served, load: Load, tmp_path: Path) -> None:
    trace = tmp_path / "arrivals.txt"
    trace.write_text("0 series\n0.3 digits 3\n0.4 digits 3\n0.5 series\n0.55 digits 1\n")
    rows = server.metric("rafaga_batch_size_sum", model="digits")
    code, run = load(server, "--trace", str(trace), "--warm-up", "0")
    sent = {name: model.sent for name, model in run.steps[0].tally.models.items()}
    assert (code, sent) == (0, {"digits": 3, "series": 2})
    # Beside these, each request was answered once for reference: of three rows, of one.
    references = RANDOM_PAYLOADS // 2 * (3 + 1)
    assert server.metric("rafaga_batch_size_sum", model="digits") - rows == 3 + 3 + 1 + references
    trace.write_text("0 series 2\n3 digits\n")
    assert main(["load", "--server", server.address, "--trace", str(trace)]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "unknown", "--rate", "10"], 4, "no model"),
        (["--model", "digits", "--rate", "10", "--protocol", "open-inference", "--model", "unknown"], 4, "no model"),
        (["--model", "digits", "--rate", "10", "--input", "absent.gif"], 2, "absent.gif"),
        (["--model", "digits"], 2, "no load given"),
        (["--model", "digits", "--rate", "10", "--metrics", "http://127.0.0.1:1/metrics"], 2, "--metrics"),
        (["--model", "digits", "--rate", "10", "--token-file", "absent"], 2, "absent"),
        (["--model", "digits", "--rate", "10", "--server", "127.0.0.1:1"], 3, "127.0.0.1:1"),
        (["--model", "digits", "--rate", "10", "--start-at", "2020-01-01T00:00:00Z"], 2, "--start-at"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(
    server: Served, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load", "--server", server.address, *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rafaga: ")
    assert message in line


def test_a_server_that_wants_a_token(repository: Path, load: Load, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("let me in\n")
    with serving(repository, bearer_token_sha256=(hashlib.sha256(b"let me in").hexdigest(),)) as served:
        assert main(["load", "--server", served.address, "--model", "digits", "--rate", "10"]) == 4
        code, run = load(served, "--model", "digits", "--rate", "20", "--token-file", str(token))
    assert (code, set(run.steps[0].tally.outcomes)) == (0, {OK})


def compare_with_others_answers(monkeypatch: pytest.MonkeyPatch, *more: Request) -> None:
    """Every answer is wrong then. `more` are sent in the place of the first requests."""
    prepare = targets.prepare

    def swapped(*arguments: Any) -> tuple[Target, ...]:
        (target,) = prepare(*arguments)
        pairs = zip(target.requests, reversed(target.requests), strict=True)
        wrong = [replace(one, reference=other.reference) for one, other in pairs]
        return (replace(target, requests=(*more, *wrong[len(more) :])),)

    monkeypatch.setattr(targets, "prepare", swapped)


def test_wrong_answers_and_failures_are_counted_and_exit_code_1(
    server: Served, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_with_others_answers(monkeypatch, Request(b"\xff"))
    code, run = load(server, "--model", "digits", "--rate", "50", "--check-every", "1")
    (step,) = run.steps
    assert code == 1
    assert run.wrong == step.tally.checked > 0
    assert step.tally.outcomes.keys() == {OK, "INVALID_REQUEST"}, "the reasons are the server's"


def test_a_server_that_went_away(server: Served) -> None:
    async def ask() -> None:
        send = GrpcSend(Connection("127.0.0.1:1").endpoint(), prepared(server, "digits"), channels=1, check_every=0)
        with pytest.raises(CallFailed) as failed:
            await send(0, PATIENCE_S)
        await send.close()
        assert failed.value.reason == "SERVER_UNREACHABLE"

    asyncio.run(ask())


def test_a_fleet_that_cannot_connect_says_so_and_one_that_dies_too(server: Served) -> None:
    prepared_targets = prepared(server, "digits")
    away = Setup(Connection("127.0.0.1:1"), prepared_targets, connect_timeout_s=0.2)
    with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:1"):
        Fleet(away, 1).__enter__()
    died = pytest.raises(FleetError, match=f"exit code {-signal.SIGKILL}")
    with died, Fleet(Setup(Connection(server.address), prepared_targets), 2) as fleet:
        victim = fleet._processes[1].pid
        assert victim is not None
        fleet.run(
            Step(Pattern.CLOSED, callers=2, duration_s=PATIENCE_S),
            SchedulePart(),
            on_begin=lambda at_s: os.kill(victim, signal.SIGKILL),
            on_rows=lambda rows: None,
            on_tick=lambda: None,
        )


class TestMlperf:
    """MLCommons' LoadGen as the referee."""

    @pytest.fixture
    def judge(self, server: Served, tmp_path: Path) -> Judge:
        """Gives the exit code and the verdict."""
        pytest.importorskip("mlperf_loadgen", reason="LoadGen (mlcommons-loadgen) is not installed")

        def run(*arguments: str) -> tuple[int, Any]:
            verdict = tmp_path / "verdict.json"
            options = ["--duration", "0.5", "--mlperf-log", str(tmp_path / "log"), "--json", str(verdict), *arguments]
            code = main(["load", "--server", server.address, "--model", "digits", *options])
            return code, json.loads(verdict.read_text())

        return run

    @pytest.mark.parametrize(
        ("scenario", "options"),
        [
            ("server", ["--rate", "200", "--slo-p99-ms", "60000"]),
            ("offline", ["--rate", "400", "--protocol", "open-inference"]),
            ("single-stream", []),
            ("multi-stream", []),
        ],
    )
    def test_a_scenario(
        self, judge: Judge, tmp_path: Path, scenario: str, options: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Half a second is rarely valid by MLPerf's rules; only the measurement is checked."""
        code, verdict = judge("--mlperf", scenario, "--check-every", "3", *options)
        assert code == (0 if verdict["valid"] else 1)
        assert verdict["valid"] or verdict["reason"]
        assert (verdict["scenario"], verdict["failures"], verdict["wrong"]) == (scenario, {}, 0)
        assert 0 < verdict["p50_ms"] <= verdict["p99_ms"]
        assert min(verdict["rate"], verdict["checked"]) > 0
        out = capsys.readouterr().out
        assert f"digits, MLPerf {scenario}: " in out
        assert "all as expected" in out
        log = mlperf.read_log(tmp_path / "log" / mlperf.DETAIL)
        assert log["effective_scenario"].lower() == scenario.replace("-", "")
        assert "Result is : " in (tmp_path / "log" / mlperf.SUMMARY).read_text()

    def test_failures_and_wrong_answers_are_seen_where_loadgen_sees_none(
        self, judge: Judge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compare_with_others_answers(monkeypatch, Request(b"\xff"))
        code, verdict = judge("--mlperf", "server", "--rate", "100", "--check-every", "1")
        assert (code, verdict["failures"].keys()) == (1, {"INVALID_REQUEST"})
        assert verdict["wrong"] > 0

    def test_without_loadgen_it_says_what_to_install(
        self, server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
        log = str(tmp_path / "log")
        arguments = ["--model", "digits", "--mlperf", "single-stream", "--mlperf-log", log, "--duration", "0.5"]
        assert main(["load", "--server", server.address, *arguments]) == 1
        assert "pip install 'rafaga[mlperf]'" in capsys.readouterr().err
