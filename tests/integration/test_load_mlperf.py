"""MLCommons' LoadGen as the referee: all its scenarios against a real server, and its log as it leaves it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rafaga.cli import main
from rafaga.load import mlperf, targets
from rafaga.load.codecs.base import Request, Target
from tests.integration.serving import Served, serving


@pytest.fixture(scope="module")
def plain(repository: Path) -> Iterator[Served]:
    pytest.importorskip("mlperf_loadgen", reason="LoadGen (mlcommons-loadgen) is not installed")
    with serving(repository) as served:
        yield served


def load(served: Served, folder: Path, *arguments: str) -> int:
    paths = ["--mlperf-log", str(folder / "log"), "--json", str(folder / "verdict.json")]
    return main(["load", "--server", served.address, "--model", "digits", "--duration", "0.5", *paths, *arguments])


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
    plain: Served, tmp_path: Path, scenario: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a second is rarely valid by MLPerf's rules; only the measurement is checked."""
    code = load(plain, tmp_path, "--mlperf", scenario, "--check-every", "3", *options)
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert code == (0 if verdict["valid"] else 1)
    assert verdict["valid"] or verdict["reason"]
    assert verdict["scenario"] == scenario
    assert verdict["rate"] > 0
    assert 0 < verdict["p50_ms"] <= verdict["p99_ms"]
    assert verdict["checked"] > 0
    assert (verdict["failures"], verdict["wrong"]) == ({}, 0)
    out = capsys.readouterr().out
    assert f"digits, MLPerf {scenario}: " in out
    assert "all as expected" in out
    log = mlperf.read_log(tmp_path / "log" / mlperf.DETAIL)
    assert log["effective_scenario"].lower() == scenario.replace("-", "")
    assert "Result is : " in (tmp_path / "log" / mlperf.SUMMARY).read_text()


def test_failures_and_wrong_answers_are_seen_where_loadgen_sees_none(
    plain: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = targets.prepare

    def damaged(*arguments: Any) -> tuple[Target, ...]:
        (target,) = prepare(*arguments)
        others = zip(target.requests[1:], target.requests[:0:-1], strict=True)
        swapped = (replace(one, reference=other.reference) for one, other in others)
        return (replace(target, requests=(Request(b"\xff"), *swapped)),)

    monkeypatch.setattr(targets, "prepare", damaged)
    assert load(plain, tmp_path, "--mlperf", "server", "--rate", "100", "--check-every", "1") == 1
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["failures"].keys() == {"INVALID_REQUEST"}
    assert verdict["wrong"] > 0


def test_without_loadgen_it_says_what_to_install(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with serving(repository) as served:
        assert load(served, tmp_path, "--mlperf", "single-stream") == 1
    assert "pip install 'rafaga[mlperf]'" in capsys.readouterr().err
