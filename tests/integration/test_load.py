"""`rafaga load` against real servers: what is sent, what is counted, what is written, and the exit codes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rafaga.cli import main
from rafaga.errors import ServerUnreachable
from rafaga.load import command, document, targets
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


@pytest.fixture(scope="module")
def plain(repository: Path) -> Iterator[Served]:
    """A server of this module's own."""
    with serving(repository) as served:
        yield served


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., tuple[int, LoadRun]]:
    """Runs the command against a server; gives the exit code and what --json wrote."""

    def run(served: Served, *arguments: str) -> tuple[int, LoadRun]:
        path = tmp_path / "run.json"
        code = main(["load", "--server", served.address, "--json", str(path), *QUICK, *arguments])
        return code, document.read(path)

    return run


def prepared(served: Served, *models: str, wire: Wire = Wire.RAFAGA) -> tuple[Target, ...]:
    return targets.prepare(Connection(served.address), wire, dict.fromkeys(models, 1.0), Payloads(), PATIENCE_S)


def test_an_open_loop_sends_its_schedule_and_reports_everything(
    server: Served, load: Callable[..., tuple[int, LoadRun]], capsys: pytest.CaptureFixture[str]
) -> None:
    """1. Poisson arrivals over rafaga.v1. 2. Every request of the window is answered, some checked. 3. The replies
    show where the time went, and so does /metrics."""
    metrics = f"http://127.0.0.1:{server.server.http_port}/metrics"
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


def test_metrics_of_one_of_two_servers(
    plain: Served, load: Callable[..., tuple[int, LoadRun]], capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--server", f"{plain.address},{plain.address}"]
    metrics = f"http://127.0.0.1:{plain.server.http_port}/metrics"
    code, run = load(plain, *both, "--model", "digits", "--rate", "50", "--metrics", metrics)
    assert code == 0
    assert run.addresses == 2
    assert "warning: 2 addresses shared the calls" in capsys.readouterr().out


def test_a_mix_over_open_inference_in_two_processes(
    server: Served, load: Callable[..., tuple[int, LoadRun]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Replies of this protocol say nothing of where the time went; /metrics does."""
    code, run = load(
        server,
        *["--model", "digits=2", "--model", "series", "--model", "backbone", "--size", "32x48"],
        *["--protocol", "open-inference", "--rate", "80", "--processes", "2"],
        *["--metrics", f"http://127.0.0.1:{server.server.http_port}/metrics"],
    )
    assert code == 0
    (step,) = run.steps
    assert set(step.tally.models) == {"digits", "series", "backbone"}
    assert set(step.tally.outcomes) == {OK}
    assert step.tally.wrong == 0
    assert len(step.generators) == 2
    assert step.tally.queue.count == 0
    assert step.server is not None
    assert step.server.mean_queue_us > 0
    assert f"queue {step.server.mean_queue_us / 1e3:.2f} ms, preprocessing" in capsys.readouterr().out
    assert "Where the time went" in page.render(run)


def test_callers_that_wait_and_a_mix_of_files_over_rafaga(
    plain: Served, load: Callable[..., tuple[int, LoadRun]], tmp_path: Path
) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(messages.png(messages.random_digits(i)[0, :, :, 0]))
    (folder / "history.csv").write_text("day,value\n" + "\n".join(f"{i},{i / 7}" for i in range(30)))
    models = ["--model", "digits", "--model", "series", "--model", "backbone"]
    code, run = load(plain, *models, "--input", str(folder), "--column", "value", "--concurrency", "4", *CLOSED)
    assert code == 0
    (step,) = run.steps
    assert (step.step.pattern, step.step.callers) == (Pattern.CLOSED, 4)
    assert set(step.tally.models) == {"digits", "series", "backbone"}
    assert set(step.tally.outcomes) == {OK}
    assert step.tally.preprocess.max_us > 0, "files are decoded by the server"
    assert not any("late" in warning for warning in step.figures.warnings), "without a schedule there is no lateness"
    assert run.conditions.payload == "3 images, 1 series"


@pytest.mark.parametrize("protocol", ["rafaga", "open-inference"])
def test_every_task_can_be_loaded(tmp_path: Path, load: Callable[..., tuple[int, LoadRun]], protocol: str) -> None:
    """Objects, segments, next symbols and forecasts with covariates (those over rafaga.v1) as well, all answers
    checked."""
    for publish in (
        bundles.publish_detector,
        bundles.publish_segmenter,
        bundles.publish_sequence_model,
        bundles.publish_forecaster_with_covariates,
    ):
        publish(tmp_path / "repository")
    names = ("detector", "segmenter", "letters", *(["sales"] if protocol == "rafaga" else []))
    with serving(tmp_path / "repository") as served:
        arguments = [word for name in names for word in ("--model", name)]
        callers = ["--concurrency", "2", *CLOSED]
        code, run = load(served, *arguments, "--protocol", protocol, "--check-every", "1", *callers)
    assert code == 0
    (step,) = run.steps
    assert set(step.tally.models) == set(names)
    assert set(step.tally.outcomes) == {OK}
    assert (step.tally.checked, step.tally.wrong) == (step.tally.ok, 0)


def test_a_ramp_goes_step_by_step(plain: Served, load: Callable[..., tuple[int, LoadRun]]) -> None:
    arguments = ["--ramp", "20:60:2", "--arrivals", "constant", "--duration", "0.4"]
    code, run = load(plain, "--model", "digits", *arguments, "--slo-p99-ms", "60000")
    assert code == 0
    assert [r.step.rate for r in run.steps] == [20, 60]
    assert [r.tally.sent for r in run.steps] == [8, 24]
    assert run.met is True


def test_an_objective_that_is_missed_is_exit_code_1(plain: Served, load: Callable[..., tuple[int, LoadRun]]) -> None:
    code, run = load(plain, "--model", "digits", "--rate", "20", "--slo-p99-ms", "0.001")
    assert code == 1
    assert run.met is False
    assert run.steps[0].figures.goodput == 0


def test_two_machines_share_a_run(plain: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1. Each sends its part and writes its raw counts. 2. Merged, they are the whole schedule, each request once."""
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    common = ["load", "--server", plain.address, "--model", "digits", "--rate", "60", *QUICK]
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


def test_the_highest_rate_is_found(tmp_path: Path, load: Callable[..., tuple[int, LoadRun]]) -> None:
    """The rate is doubled until too much is due for a server of 20 ms per row: it refuses what more than two wait
    before."""
    bundles.publish_classifier(tmp_path / "repository")
    with serving(tmp_path / "repository", Pace(0.02).load, max_batch_size=1, max_queue_requests=2) as served:
        code, run = load(served, "--model", "digits", *FIND, "--rate", "5", "--precision", "100")
    assert code == 0
    assert run.max_rate is not None
    assert run.max_rate >= 10
    assert [r.step.rate for r in run.steps] == [5 * 2**n for n in range(len(run.steps))]
    assert [r.figures.met for r in run.steps] == [True] * (len(run.steps) - 1) + [False]


def test_a_search_without_a_guess_makes_one(
    plain: Served, load: Callable[..., tuple[int, LoadRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_PROBE", replace(command._PROBE, warm_up_s=0.0, duration_s=0.3))
    arguments = ["--find-max", "--slo-p99-ms", "0.001", "--duration", "0.1", "--warm-up", "0", "--deadline-ms", "50"]
    code, run = load(plain, "--model", "digits", *arguments)
    assert code == 1
    assert run.max_rate == 0
    assert min(r.step.rate for r in run.steps if r.step.open) == 50, "down to five requests in a step"


def test_a_trace_says_which_model_gets_how_many_rows(
    plain: Served, load: Callable[..., tuple[int, LoadRun]], tmp_path: Path
) -> None:
    trace = tmp_path / "arrivals.txt"
    trace.write_text("0 series\n0.3 digits 3\n0.4 digits 3\n0.5 series\n0.55 digits 1\n")
    rows = plain.metric("rafaga_batch_size_sum", model="digits")
    code, run = load(plain, "--trace", str(trace), "--warm-up", "0")
    assert code == 0
    assert {name: model.sent for name, model in run.steps[0].tally.models.items()} == {"digits": 3, "series": 2}
    # Beside these, each request was answered once for reference: of three rows, of one.
    references = RANDOM_PAYLOADS // 2 * (3 + 1)
    assert plain.metric("rafaga_batch_size_sum", model="digits") - rows == 3 + 3 + 1 + references
    trace.write_text("0 series 2\n3 digits\n")
    assert main(["load", "--server", plain.address, "--trace", str(trace)]) == 2


def test_a_common_start_that_is_over(plain: Served, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "digits", "--rate", "10", *QUICK, "--start-at", "2020-01-01T00:00:00Z"]
    assert main(["load", "--server", plain.address, *arguments]) == 2
    assert "--start-at" in capsys.readouterr().err


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
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(
    plain: Served, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load", "--server", plain.address, *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rafaga: ")
    assert message in line


def test_a_server_that_wants_a_token(
    repository: Path, load: Callable[..., tuple[int, LoadRun]], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("let me in\n")
    with serving(repository, bearer_token_sha256=(hashlib.sha256(b"let me in").hexdigest(),)) as served:
        assert main(["load", "--server", served.address, "--model", "digits", "--rate", "10"]) == 4
        code, run = load(served, "--model", "digits", "--rate", "20", "--token-file", str(token))
    assert code == 0
    assert set(run.steps[0].tally.outcomes) == {OK}


def test_wrong_answers_are_exit_code_1(
    plain: Served, load: Callable[..., tuple[int, LoadRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = targets.prepare

    def swapped(*arguments: object) -> tuple[Target, ...]:
        (target,) = prepare(*arguments)  # type: ignore[arg-type]
        pairs = zip(target.requests, reversed(target.requests), strict=True)
        return (replace(target, requests=tuple(replace(one, reference=other.reference) for one, other in pairs)),)

    monkeypatch.setattr(targets, "prepare", swapped)
    code, run = load(plain, "--model", "digits", "--rate", "50", "--check-every", "1")
    assert code == 1
    assert run.wrong == run.steps[0].tally.checked > 0


def test_reasons_of_failures_are_the_servers(plain: Served) -> None:
    (target,) = prepared(plain, "digits")
    broken = replace(target, requests=(Request(b"\xff"),))

    async def ask(address: str, timeout_s: float) -> str:
        send = GrpcSend(Connection(address).endpoint(), [broken], channels=1, check_every=0)
        try:
            with pytest.raises(CallFailed) as failed:
                await send(0, timeout_s)
            return failed.value.reason
        finally:
            await send.close()

    assert asyncio.run(ask(plain.address, PATIENCE_S)) == "INVALID_REQUEST"
    assert asyncio.run(ask("127.0.0.1:1", PATIENCE_S)) == "SERVER_UNREACHABLE"


def test_a_fleet_that_cannot_connect_says_so_and_one_that_dies_too(plain: Served) -> None:
    prepared_targets = prepared(plain, "digits")
    away = Setup(Connection("127.0.0.1:1"), prepared_targets, connect_timeout_s=0.2)
    with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:1"):
        Fleet(away, 1).__enter__()
    died = pytest.raises(FleetError, match=f"exit code {-signal.SIGKILL}")
    with died, Fleet(Setup(Connection(plain.address), prepared_targets), 2) as fleet:
        victim = fleet._processes[1].pid
        assert victim is not None
        fleet.run(
            Step(Pattern.CLOSED, callers=2, duration_s=PATIENCE_S),
            SchedulePart(),
            on_begin=lambda at_s: os.kill(victim, signal.SIGKILL),
            on_rows=lambda rows: None,
            on_tick=lambda: None,
        )
