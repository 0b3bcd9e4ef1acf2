"""`rafaga load` beside two generators that others made, on a server whose runs take as long as the test says.

Rates of a steady server agree within 5 %. A stall of a second shows where the clock starts when a request is due, and
hides where it starts at the send.
"""

from __future__ import annotations

import csv
import json
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
from tests.integration.pace import Pace
from tests.integration.serving import Served, serving

pytestmark = pytest.mark.nightly

# Long enough that what the generators and the transport cost is little of it; a run for every row, so that neither
# batches nor windows that cut through them move the rate.
ROW_S = 0.010
WINDOW_S = 5
# Arrivals at random: as many as make the count's own spread (one over its root) small beside 5 %.
RANDOM_RATE, RANDOM_S = 80, 40


class Measured(NamedTuple):
    """Requests per second, milliseconds."""

    rate: float
    p99_ms: float


Measure = Callable[..., Measured]


@pytest.fixture(scope="module")
def pace() -> Pace:
    return Pace(ROW_S)


@pytest.fixture(scope="module")
def steady(pace: Pace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("steady")
    bundles.publish_classifier(root)
    with pace.set(), serving(root, "grpcio", max_batch_size=1, max_queue_wait_ms=60_000) as served:
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
    """Three windows, whatever they say: this tool would otherwise repeat until it finds them equal."""

    def measure(*options: str, seconds: float = WINDOW_S) -> Measured:
        path = tmp_path / "report.csv"
        windows = ["-p", str(round(seconds * 1000)), "--stability-percentage", "999", "--max-trials", "3"]
        command = [perf_analyzer, "-u", steady.address, "-i", "grpc", "-m", "digits", "-f", str(path), *windows]
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
    command = [sys.executable, "-m", "rafaga.cli", "load", "--server", steady.address, "--model", "digits"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=170, check=False)
    # 1: by LoadGen's rules most runs of this length are too short.
    assert done.returncode in (0, 1), done.stderr


def assert_agree(ours: Measured, theirs: Measured, name: str) -> None:
    print(f"rafaga load {ours.rate:.1f}/s, {name} {theirs.rate:.1f}/s: {ours.rate / theirs.rate - 1:+.1%}")
    assert ours.rate == pytest.approx(theirs.rate, rel=0.05)


@pytest.mark.parametrize("protocol", ["open-inference", "rafaga"])
@pytest.mark.parametrize("callers", ["1", "8"])
def test_callers_that_wait_agree_with_perf_analyzer(ours: Measure, perf: Measure, callers: str, protocol: str) -> None:
    assert_agree(
        ours("--concurrency", callers, "--protocol", protocol),
        perf("--concurrency-range", callers, "--async"),
        "perf_analyzer",
    )


def test_a_metronome_agrees_with_perf_analyzer(ours: Measure, perf: Measure) -> None:
    assert_agree(
        ours("--rate", "50", "--arrivals", "constant", "--protocol", "open-inference"),
        perf("--request-rate-range", "50", "--async"),
        "perf_analyzer",
    )


def test_random_arrivals_agree_with_perf_analyzer(ours: Measure, perf: Measure) -> None:
    assert_agree(
        ours("--rate", str(RANDOM_RATE), "--protocol", "open-inference", seconds=RANDOM_S),
        perf(
            *("--request-rate-range", str(RANDOM_RATE), "--request-distribution", "poisson", "--async"),
            seconds=RANDOM_S / 3,
        ),
        "perf_analyzer",
    )


@pytest.mark.parametrize(
    ("options", "scenario", "seconds"),
    [
        pytest.param(["--concurrency", "1"], ["single-stream"], WINDOW_S, id="single-stream"),
        pytest.param(["--concurrency", "64"], ["offline", "--rate", "95"], WINDOW_S, id="offline"),
        pytest.param(["--rate", str(RANDOM_RATE)], ["server", "--rate", str(RANDOM_RATE)], RANDOM_S, id="server"),
    ],
)
def test_rates_agree_with_loadgen(
    ours: Measure, loadgen: Measure, options: list[str], scenario: list[str], seconds: float
) -> None:
    assert_agree(ours(*options, seconds=seconds), loadgen(*scenario, seconds=seconds), "LoadGen")


@contextmanager
def stalling(pace: Pace) -> Iterator[None]:
    """Of every window a second in which nobody gets an answer."""
    done = threading.Event()

    def stall() -> None:
        while not done.wait(WINDOW_S - 1):
            with pace.standstill():
                done.wait(1.0)

    thread = threading.Thread(target=stall)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_stall_shows_in_our_p99_and_hides_from_a_clock_that_starts_at_the_send(
    pace: Pace, ours: Measure, perf: Measure
) -> None:
    """Independent callers, 50 a second: an eighth of them falls into a stall. The other tool, as it comes, has sixteen
    threads that wait; what they do not send in time they do not count."""
    with stalling(pace):
        seen = ours("--rate", "50", "--arrivals", "constant", seconds=2 * WINDOW_S)
        hidden = perf("--request-rate-range", "50")
    print(f"p99: rafaga load {seen.p99_ms:.0f} ms, perf_analyzer {hidden.p99_ms:.0f} ms")
    assert seen.p99_ms > 800
    assert hidden.p99_ms < 400
