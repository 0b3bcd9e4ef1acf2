"""The command line: what it means, and what it refuses before anything is sent."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from rafaga.load.codecs import Wire
from rafaga.load.figures import Objective
from rafaga.load.options import OptionsError, parse_load, parse_merge
from rafaga.load.payloads import PayloadError
from rafaga.load.schedule import Part, Pattern
from rafaga.load.steps import Step

MODEL = ["--model", "m"]


def steps(*arguments: str) -> tuple[Step, ...]:
    return parse_load([*MODEL, *arguments], {}).steps


def test_a_rate() -> None:
    options = parse_load([*MODEL, "--rate", "50"], {})
    assert options.steps == (Step(Pattern.POISSON, rate=50, warm_up_s=2, duration_s=10),)
    assert options.connection.address == "localhost:50051"
    assert options.conditions.models == {"m": 1.0}
    assert options.conditions.protocol is Wire.RAFAGA
    assert options.conditions.objective is None
    assert (options.processes, options.channels, options.part) == (1, 8, Part())


def test_every_other_load() -> None:
    assert steps("--rate", "5", "--arrivals", "constant", "--duration", "3", "--warm-up", "0", "--seed", "4") == (
        Step(Pattern.CONSTANT, rate=5, warm_up_s=0, duration_s=3, seed=4),
    )
    assert steps("--concurrency", "32") == (Step(Pattern.CLOSED, callers=32, warm_up_s=2, duration_s=10),)
    ramp = steps("--ramp", "100:300:3")
    assert [(s.rate, s.seed) for s in ramp] == [(100, 0), (200, 1), (300, 2)]
    assert steps("--find-max", "--slo-p99-ms", "5")[0].rate == 0
    assert steps("--find-max", "--slo-p99-ms", "5", "--rate", "70")[0].rate == 70


def test_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "arrivals"
    path.write_text("# recorded on a Tuesday\n1000.0\n1000.5\n\n1002.0\n1004.0\n")
    options = parse_load([*MODEL, "--trace", str(path), "--warm-up", "1"], {})
    (step,) = options.steps
    assert options.trace is not None
    np.testing.assert_allclose(options.trace, [0, 0.5, 2, 4])
    assert (step.pattern, step.warm_up_s) == (Pattern.TRACE, 1)
    assert step.duration_s == pytest.approx(3)
    assert step.rate == pytest.approx(2 / 3), "two of the four come after the warm-up"
    schedule = step.schedule([1.0], options.trace)
    np.testing.assert_allclose(schedule.due_s, [-1, -0.5, 1, 3])
    assert (schedule.due_s < step.duration_s).all()
    cut = parse_load([*MODEL, "--trace", str(path), "--warm-up", "0", "--duration", "2.5"], {}).steps[0]
    assert (cut.duration_s, cut.rate) == (2.5, pytest.approx(3 / 2.5))
    np.testing.assert_allclose(cut.schedule([1.0], options.trace).due_s, [0, 0.5, 2])


def test_a_mix_over_the_other_protocol() -> None:
    arguments = ["--model", "a=3", "--model", "b", "--rate", "1", "--protocol", "open-inference"]
    conditions = parse_load(arguments, {}).conditions
    assert (conditions.models, conditions.protocol) == ({"a": 3.0, "b": 1.0}, Wire.OPEN_INFERENCE)


def test_shares_and_starts() -> None:
    options = parse_load([*MODEL, "--rate", "1", "--part", "2/3", "--start-at", "2026-01-31T12:00:00Z"], {})
    assert options.part == Part(1, 3)
    assert options.start_at == datetime(2026, 1, 31, 12, tzinfo=UTC)


def test_the_environment_names_the_server_and_a_file_the_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    options = parse_load([*MODEL, "--rate", "1", "--token-file", str(token)], {"RAFAGA_SERVER": "there:1"})
    assert (options.connection.address, options.connection.token) == ("there:1", "secret")
    assert "secret" not in repr(options)


def test_merging() -> None:
    options = parse_merge(["a.json", "b.json", "--slo-p99-ms", "5", "--report", "r.html"])
    assert options.files == (Path("a.json"), Path("b.json"))
    assert options.objective == Objective(5.0)
    assert options.outputs.report == Path("r.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which load"),
        (["--find-max"], "needs an objective"),
        (["--find-max", "--slo-p99-ms", "5", "--part", "1/2"], "cannot be shared"),
        (["--find-max", "--slo-p99-ms", "5", "--concurrency", "5"], "callers that wait"),
        (["--find-max", "--slo-p99-ms", "5", "--ramp", "1:2:3"], "leave out --ramp"),
        (["--rate", "5", "--model", "m"], "given twice"),
        (["--rate", "5", "--server", "nowhere"], "no address|nowhere"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], message: str) -> None:
    if "--server" in arguments:
        arguments = [*arguments[:-1], "a:1,nowhere"]
    with pytest.raises(OptionsError, match=message):
        parse_load([*MODEL, *arguments], {})


@pytest.mark.parametrize(
    ("content", "message"),
    [("1\ntwo\n", "time in seconds per line"), ("1\n", "at least two"), ("1\ninf\n", "finite"), ("1\n2\n", "left")],
)
def test_a_trace_that_is_none(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "arrivals"
    path.write_text(content)
    with pytest.raises(OptionsError, match=message):
        parse_load([*MODEL, "--trace", str(path)], {})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rate", "0"],
        ["--rate", "nan"],
        ["--rate", "5", "--concurrency", "5"],
        ["--concurrency", "1.5"],
        ["--ramp", "1:2"],
        ["--ramp", "1:2:0"],
        ["--rate", "1", "--part", "3/2"],
        ["--rate", "1", "--part", "0/2"],
        ["--rate", "1", "--model", "=3"],
        ["--rate", "1", "--model", "m=-1"],
        ["--rate", "1", "--start-at", "noon"],
        ["--rate", "1", "--size", "224"],
        ["--rate", "1", "--arrivals", "trace"],
        ["--rate", "1", "--protocol", "rest"],
    ],
)
def test_values_that_cannot_be(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_load([*MODEL, *arguments], {})
    assert ended.value.code == 2
    assert "rafaga load: error:" in capsys.readouterr().err


def test_a_missing_model_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        parse_load(["--rate", "1"], {})
    with pytest.raises(FileNotFoundError):
        parse_load([*MODEL, "--trace", str(tmp_path / "absent")], {})
    with pytest.raises(PayloadError):
        parse_load([*MODEL, "--rate", "1", "--input", str(tmp_path / "absent.gif")], {})
