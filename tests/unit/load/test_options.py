"""The command line: what it means, and what it refuses before anything is sent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rafaga.load.arguments import OptionsError
from rafaga.load.codecs.base import Wire
from rafaga.load.figures import Objective
from rafaga.load.options import parse_load, parse_merge
from rafaga.load.payloads import PayloadError
from rafaga.load.schedule import MixEntry, Pattern, SchedulePart
from rafaga.load.steps import Step

MODEL = ["--model", "m"]


def test_what_is_sent_unless_told_otherwise() -> None:
    options = parse_load([*MODEL, "--rate", "50"], {})
    assert options.connection.address == "localhost:50051"
    assert (options.conditions.models, options.conditions.protocol) == ({"m": 1.0}, Wire.RAFAGA)
    assert options.conditions.objective is None
    assert (options.processes, options.channels, options.part) == (1, 8, SchedulePart())


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("--rate 50", [Step(Pattern.POISSON, rate=50, warm_up_s=2, duration_s=10)]),
        (
            "--rate 5 --arrivals constant --duration 3 --warm-up 0 --seed 4",
            [Step(Pattern.CONSTANT, rate=5, warm_up_s=0, duration_s=3, seed=4)],
        ),
        ("--concurrency 32", [Step(Pattern.CLOSED, callers=32, warm_up_s=2, duration_s=10)]),
        (
            "--ramp 100:300:3",
            [Step(Pattern.POISSON, rate=100.0 * (1 + i), warm_up_s=2, duration_s=10, seed=i) for i in range(3)],
        ),
        ("--find-max --slo-p99-ms 5", [Step(Pattern.POISSON, rate=0, warm_up_s=2, duration_s=10)]),
        ("--find-max --slo-p99-ms 5 --rate 70", [Step(Pattern.POISSON, rate=70, warm_up_s=2, duration_s=10)]),
    ],
)
def test_every_load(words: str, steps: list[Step]) -> None:
    assert list(parse_load([*MODEL, *words.split()], {}).steps) == steps


def test_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "arrivals"
    path.write_text("1000.0\n1000.5\n1002.0\n1004.0\n")
    options = parse_load([*MODEL, "--trace", str(path), "--warm-up", "1"], {})
    (step,) = options.steps
    assert options.trace is not None
    assert (step.pattern, step.warm_up_s) == (Pattern.TRACE, 1)
    assert step.duration_s == pytest.approx(3)
    assert step.rate == pytest.approx(2 / 3), "two of the four come after the warm-up"
    replayed = options.trace.schedule([MixEntry("m", 1, 1.0)], seed=0)
    schedule = step.schedule([1.0], replayed)
    np.testing.assert_allclose(schedule.due_s, [-1, -0.5, 1, 3])
    assert (schedule.due_s < step.duration_s).all()
    cut = parse_load([*MODEL, "--trace", str(path), "--warm-up", "0", "--duration", "2.5"], {}).steps[0]
    assert (cut.duration_s, cut.rate) == (2.5, pytest.approx(3 / 2.5))
    np.testing.assert_allclose(cut.schedule([1.0], replayed).due_s, [0, 0.5, 2])


def test_a_trace_may_name_the_models(tmp_path: Path) -> None:
    path = tmp_path / "arrivals"
    path.write_text("0 a\n3 b 2\n")
    assert parse_load(["--trace", str(path)], {}).conditions.models == {"a": 1.0, "b": 1.0}
    given = parse_load(["--trace", str(path), "--model", "b=2", "--model", "a", "--model", "c"], {})
    assert given.conditions.models == {"b": 2.0, "a": 1.0, "c": 1.0}
    with pytest.raises(OptionsError, match="--trace names models that are missing from --model: a"):
        parse_load(["--trace", str(path), "--model", "b"], {})
    path.write_text("0 a\n3\n")
    with pytest.raises(OptionsError, match="names one in every line"):
        parse_load(["--trace", str(path)], {})


def test_an_objective_for_each_model() -> None:
    models = ["--model", "a", "--model", "b", "--rate", "1"]
    for text, objective in (
        ("50", Objective(50)),
        ("50,b=10", Objective(50, {"b": 10})),
        ("a=5,b=10.5", Objective(None, {"a": 5, "b": 10.5})),
    ):
        assert parse_load([*models, "--slo-p99-ms", text], {}).conditions.objective == objective


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
    ("words", "message"),
    [
        ("--model m", "no load given"),
        ("--rate 1", "no model given"),
        ("--model m --find-max", "needs an objective"),
        ("--model m --rate 1 --metrics http://a/metrics --metrics http://a/metrics", "given more than once"),
        ("--model m --find-max --slo-p99-ms 5 --part 1/2", "cannot be shared"),
        ("--model m --find-max --slo-p99-ms 5 --concurrency 5", "not --concurrency"),
        ("--model m --find-max --slo-p99-ms 5 --ramp 1:2:3", "leave out --ramp"),
        ("--model m --rate 5 --model m", "--model m is given more than once"),
        ("--model m --rate 5 --rows 2 --rows 2=3", "--rows 2 is given more than once"),
        ("--model m --rate 5 --size 2x3 --size 2x3", "--size 2x3 is given more than once"),
        ("--model m --rate 5 --slo-p99-ms 5,other=3", "--slo-p99-ms: no --model other"),
        ("--model m --rate 5 --mlperf server --rows 1 --rows 2", "all but one --rows"),
        ("--model m --rate 5 --server a:1,nowhere:", "no address|nowhere"),
    ],
)
def test_options_that_do_not_go_together(words: str, message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        parse_load(words.split(), {})


UNREADABLE = (
    *("--rate 0", "--rate 5 --concurrency 5", "--ramp 1:2", "--rate 1 --part 3/2", "--rate 1 --model =3"),
    *("--rate 1 --start-at noon", "--rate 1 --size 224", "--rate 1 --rows 1=", "--rate 1 --slo-p99-ms 0"),
    *("--rate 1 --slo-p99-ms 5,6", "--rate 1 --arrivals trace", "--rate 1 --protocol rest"),
)


@pytest.mark.parametrize("words", UNREADABLE)
def test_values_that_cannot_be(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_load([*MODEL, *words.split()], {})
    assert ended.value.code == 2
    assert "rafaga load: " in capsys.readouterr().err


def test_files_that_are_missing_or_too_short(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_text("1\n2\n")
    for option, file, error in (
        ("--trace", path, OptionsError),
        ("--trace", tmp_path / "absent", FileNotFoundError),
        ("--input", tmp_path / "absent.tif", PayloadError),
    ):
        with pytest.raises(error):
            parse_load([*MODEL, option, str(file), *(["--rate", "1"] if option == "--input" else [])], {})
