"""What is read from LoadGen's log, and what cannot be left to LoadGen."""

from __future__ import annotations

from pathlib import Path

import pytest

from rafaga.load import mlperf
from rafaga.load.arguments import OptionsError
from rafaga.load.mlperf import MlperfError, MlperfPlan, Scenario
from rafaga.load.options import parse_load

PLAN = MlperfPlan(Scenario.SERVER, 100.0, 10.0, 20.0, 5.0, 3, Path("mlperf-log"))


def test_a_plan() -> None:
    arguments = ["--mlperf", "server", "--rate", "100", "--slo-p99-ms", "20", "--seed", "3", "--deadline-ms", "5000"]
    options = parse_load(["--model", "m", *arguments], {})
    assert options.mlperf == PLAN
    assert options.steps == ()
    assert parse_load(["--model", "m", "--mlperf", "single-stream"], {}).mlperf is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *((scenario, "needs --rate") for scenario in ("server", "offline")),
        *(
            (f"single-stream {option} 2", f"leave out {option}")
            for option in ("--concurrency", "--report", "--processes")
        ),
        ("single-stream --model other", "one model"),
    ],
)
def test_what_loadgen_decides_by_itself(words: str, message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        parse_load(["--model", "m", "--mlperf", *words.split()], {})


def test_the_log_is_read_by_key(tmp_path: Path) -> None:
    path = tmp_path / mlperf.DETAIL
    path.write_text(
        ':::MLLOG {"key": "result_validity", "value": "INVALID", "metadata": {}}\n'
        "a line of another kind\n"
        ':::MLLOG {"key": "result_mean_latency_ns", "value": 5092261}\n'
    )
    assert mlperf.read_log(path) == {"result_validity": "INVALID", "result_mean_latency_ns": 5092261}
    with pytest.raises(MlperfError, match="no log"):
        mlperf.read_log(tmp_path / "absent")
