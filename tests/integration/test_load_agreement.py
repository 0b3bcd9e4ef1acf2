"""`rafaga load` compared with two other load generators, on a server whose runs take a set time.

Rates of a steady server agree within 5 %. A stall of a second shows, because the clock starts when a request is due.

A machine that has other things to do slows one generator and then the other: they take turns, and the median of their
ratios counts. All of it is nightly: 5 % needs minutes.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from rafaga.load import document
from tests import bundles
from tests.integration.serving import Served, serving
from tests.integration.valve import Pace

ROUNDS, WINDOW_S = 3, 9
# A run for every row, so that neither batches nor windows that cut through them move the rate.
ROW_S = 0.010
# Callers that wait keep the server busy all the time. What generator and transport cost a lone one is part of every
# turn: little compared with this, even on a machine with much else to do.
SLOW_ROW_S, SLOWEST_ROW_S = 0.05, 0.1
# Each tool draws its own arrivals at random. So many that 5 % are three standard deviations of the counts' difference,
# the root of 2 / 9,000 being 1.5 %.
QUICK_ROW_S, RANDOM_RATE, RANDOM_S = 0.003, "200", 45
STALL_EVERY_S = 5


class Measured(NamedTuple):
    """Requests per second, milliseconds."""

    rate: float
    p99_ms: float


Measure = Callable[..., Measured]

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def pace() -> Pace:
    return Pace(ROW_S)


@pytest.fixture(scope="module")
def steady(pace: Pace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("steady")
    bundles.publish_classifier(root)
    with serving(root, pace.load, max_batch_size=1, max_queue_wait_ms=60_000) as served:
        yield served


@pytest.fixture
def ours(steady: Served, tmp_path: Path) -> Measure:
    """In a process of its own, as the others are: the server has this one for itself."""

    def measure(seconds: float, *options: str) -> Measured:
        path = tmp_path / "run.json"
        _rafaga(steady, "--duration", str(seconds), "--warm-up", "1", "--json", str(path), *options)
        figures = document.read(path).steps[0].figures
        assert figures.refused == figures.failed == figures.wrong == 0
        return Measured(figures.answered, figures.latency.p99_ms)

    return measure


@pytest.fixture
def perf(steady: Served, perf_analyzer: Path, tmp_path: Path) -> Measure:
    """Three windows, whatever they say: this tool would otherwise repeat until it finds them equal."""

    def measure(seconds: float, *options: str) -> Measured:
        path = tmp_path / "report.csv"
        windows = ["-p", str(round(seconds * 1000 / 3)), "--stability-percentage", "999", "--max-trials", "3"]
        command = [str(perf_analyzer), "-u", steady.address, "-i", "grpc", "-m", "digits", "-f", str(path), *windows]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=170, check=False)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
        with path.open() as file:
            (row,) = csv.DictReader(file)
        return Measured(float(row["Inferences/Second"]), float(row["p99 latency"]) / 1e3)

    return measure


@pytest.fixture
def loadgen(steady: Served, tmp_path: Path) -> Measure:
    pytest.importorskip("mlperf_loadgen", reason="LoadGen (mlcommons-loadgen) is not installed")

    def measure(seconds: float, *options: str) -> Measured:
        path = tmp_path / "verdict.json"
        log = str(tmp_path / "log")
        _rafaga(steady, "--duration", str(seconds), "--json", str(path), "--mlperf-log", log, "--mlperf", *options)
        verdict = json.loads(path.read_text())
        assert (verdict["failures"], verdict["wrong"]) == ({}, 0)
        return Measured(verdict["rate"], verdict["p99_ms"])

    return measure


def _rafaga(steady: Served, *options: str) -> None:
    command = [sys.executable, "-m", "rafaga", "load", "--server", steady.address, "--model", "digits"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=170, check=False)
    # 1: by LoadGen's rules most runs of this length are too short.
    assert done.returncode in (0, 1), done.stderr


OPEN = ("--protocol", "open-inference")
RANDOM = ("--request-rate-range", RANDOM_RATE, "--request-distribution", "poisson")
CASES: dict[str, tuple[float, tuple[str, ...], str, tuple[str, ...]]] = {
    "callers that wait": (SLOW_ROW_S, ("--concurrency", "8"), "perf", ("--concurrency-range", "8")),
    "a caller that waits": (SLOWEST_ROW_S, ("--concurrency", "1"), "perf", ("--concurrency-range", "1")),
    "callers, one protocol": (SLOW_ROW_S, ("--concurrency", "8", *OPEN), "perf", ("--concurrency-range", "8")),
    "a caller, one protocol": (SLOWEST_ROW_S, ("--concurrency", "1", *OPEN), "perf", ("--concurrency-range", "1")),
    "metronome": (ROW_S, ("--rate", "50", "--arrivals", "constant", *OPEN), "perf", ("--request-rate-range", "50")),
    "random arrivals": (QUICK_ROW_S, ("--rate", RANDOM_RATE, *OPEN), "perf", RANDOM),
    "server": (QUICK_ROW_S, ("--rate", RANDOM_RATE), "loadgen", ("server", "--rate", RANDOM_RATE)),
    "single-stream": (SLOWEST_ROW_S, ("--concurrency", "1"), "loadgen", ("single-stream",)),
    "offline": (SLOW_ROW_S, ("--concurrency", "64"), "loadgen", ("offline", "--rate", "20")),
}


@pytest.mark.parametrize("case", CASES)
def test_rates_agree(request: pytest.FixtureRequest, pace: Pace, ours: Measure, case: str) -> None:
    row_s, options, other, its_options = CASES[case]
    theirs: Measure = request.getfixturevalue(other)
    its_options += ("--async",) if other == "perf" else ()
    rounds, seconds = (1, RANDOM_S) if row_s == QUICK_ROW_S else (ROUNDS, WINDOW_S)
    ratios = []
    with pace.at(row_s):
        for _ in range(rounds):
            mine, its = ours(seconds, *options), theirs(seconds, *its_options)
            ratios.append(mine.rate / its.rate)
            print(f"rafaga load {mine.rate:.1f}/s, {other} {its.rate:.1f}/s: {ratios[-1] - 1:+.1%}")
    assert statistics.median(ratios) == pytest.approx(1, rel=0.05)


def test_a_stall_shows_in_the_p99(pace: Pace, ours: Measure) -> None:
    """At times the server answers nothing for a second. Of 50 independent requests a second an eighth is then due.
    perf_analyzer has sixteen threads that wait, and does not count what they do not send in time."""
    done = threading.Event()

    def stall() -> None:
        while not done.wait(STALL_EVERY_S - 1):
            with pace.standstill():
                done.wait(1.0)

    thread = threading.Thread(target=stall)
    thread.start()
    try:
        assert ours(2 * STALL_EVERY_S, "--rate", "50", "--arrivals", "constant").p99_ms > 800
    finally:
        done.set()
        thread.join()
