"""`rafaga load` compared with two other load generators, on a server whose runs take a set time.

Rates of a steady server agree within 5 %. A stall of a second shows where the clock starts when a request is due, and
hides where it starts at the send.

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
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from rafaga.load import document
from tests import bundles
from tests.integration.serving import Served, serving
from tests.integration.valve import Pace

# A run for every row, so that neither batches nor windows that cut through them move the rate.
ROW_S = 0.010
# A crowd keeps the server busy all the time. What generator and transport cost a lone caller is part of every turn:
# little compared with this, even on a machine with much else to do.
SLOW_ROW_S = {"8": 0.05, "64": 0.05, "1": 0.1}
WINDOW_S = 9
ROUNDS = 3
# Each tool draws its own arrivals at random. So many that 5 % are three standard deviations of the counts' difference,
# the root of 2 / 9,000 being 1.5 %.
QUICK_ROW_S, RANDOM_RATE, RANDOM_S = 0.003, 200, 45
# The stall test's: one in each.
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

    def measure(*options: str, seconds: float = WINDOW_S) -> Measured:
        path = tmp_path / "run.json"
        _rafaga(steady, "--duration", str(seconds), "--warm-up", "1", "--json", str(path), *options)
        figures = document.read(path).steps[0].figures
        assert figures.refused == figures.failed == figures.wrong == 0
        return Measured(figures.answered, figures.latency.p99_ms)

    return measure


@pytest.fixture
def perf(steady: Served, perf_analyzer: Path, tmp_path: Path) -> Measure:
    """Three windows of `seconds`, whatever they say: this tool would otherwise repeat until it finds them equal."""

    def measure(*options: str, seconds: float) -> Measured:
        path = tmp_path / "report.csv"
        windows = ["-p", str(round(seconds * 1000)), "--stability-percentage", "999", "--max-trials", "3"]
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

    def measure(*options: str, seconds: float = WINDOW_S) -> Measured:
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


def assert_agree(ours: Callable[[], Measured], theirs: Callable[[], Measured], rounds: int = ROUNDS) -> None:
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    ratios = [mine.rate / other.rate for mine, other in pairs]
    for (mine, other), ratio in zip(pairs, ratios, strict=True):
        print(f"rafaga load {mine.rate:.1f}/s, the other {other.rate:.1f}/s: {ratio - 1:+.1%}")
    assert statistics.median(ratios) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("protocol", ["open-inference", "rafaga"])
@pytest.mark.parametrize("callers", ["1", "8"])
def test_callers_that_wait_agree_with_perf_analyzer(
    pace: Pace, ours: Measure, perf: Measure, callers: str, protocol: str
) -> None:
    with pace.at(SLOW_ROW_S[callers]):
        assert_agree(
            lambda: ours("--concurrency", callers, "--protocol", protocol),
            lambda: perf("--concurrency-range", callers, "--async", seconds=WINDOW_S / 3),
        )


def test_a_metronome_agrees_with_perf_analyzer(ours: Measure, perf: Measure) -> None:
    assert_agree(
        lambda: ours("--rate", "50", "--arrivals", "constant", "--protocol", "open-inference"),
        lambda: perf("--request-rate-range", "50", "--async", seconds=WINDOW_S / 3),
    )


def test_random_arrivals_agree_with_perf_analyzer(pace: Pace, ours: Measure, perf: Measure) -> None:
    random = ("--request-rate-range", str(RANDOM_RATE), "--request-distribution", "poisson", "--async")
    with pace.at(QUICK_ROW_S):
        assert_agree(
            lambda: ours("--rate", str(RANDOM_RATE), "--protocol", "open-inference", seconds=RANDOM_S),
            lambda: perf(*random, seconds=RANDOM_S / 3),
            rounds=1,
        )


def test_random_arrivals_agree_with_loadgen(pace: Pace, ours: Measure, loadgen: Measure) -> None:
    with pace.at(QUICK_ROW_S):
        assert_agree(
            lambda: ours("--rate", str(RANDOM_RATE), seconds=RANDOM_S),
            lambda: loadgen("server", "--rate", str(RANDOM_RATE), seconds=RANDOM_S),
            rounds=1,
        )


@pytest.mark.parametrize(
    ("callers", "scenario"),
    [
        pytest.param("1", ["single-stream"], id="single-stream"),
        pytest.param("64", ["offline", "--rate", "20"], id="offline"),
    ],
)
def test_callers_that_wait_agree_with_loadgen(
    pace: Pace, ours: Measure, loadgen: Measure, callers: str, scenario: list[str]
) -> None:
    with pace.at(SLOW_ROW_S[callers]):
        assert_agree(lambda: ours("--concurrency", callers), lambda: loadgen(*scenario))


@contextmanager
def stalling(pace: Pace) -> Iterator[None]:
    """At times a second without any answer."""
    done = threading.Event()

    def stall() -> None:
        while not done.wait(STALL_EVERY_S - 1):
            with pace.standstill():
                done.wait(1.0)

    thread = threading.Thread(target=stall)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_stall_shows_in_our_p99_whatever_a_clock_that_starts_at_the_send_shows(
    pace: Pace, ours: Measure, perf: Measure
) -> None:
    """Independent callers, 50 a second: an eighth of them falls into a stall. The other tool, as it comes, has sixteen
    threads that wait; what they do not send in time they do not count. How much they hide hangs on the machine."""
    with stalling(pace):
        seen = ours("--rate", "50", "--arrivals", "constant", seconds=2 * STALL_EVERY_S)
        hidden = perf("--request-rate-range", "50", seconds=STALL_EVERY_S)
    print(f"p99: rafaga load {seen.p99_ms:.0f} ms, perf_analyzer {hidden.p99_ms:.0f} ms")
    assert seen.p99_ms > 800
