"""Five times what a server can take: it answers as many in time as ever, refuses the rest at once, and does not grow.

The load comes from a process of its own, open loop: nobody waits for an answer before the next request is due.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rafaga.load import document
from rafaga.load.document import StepResult
from rafaga.load.log import OK
from tests.integration import graphs
from tests.process.memory import MIB, watching
from tests.process.running import Running, running

# Of runs: what callers give a request.
DEADLINE_RUNS = 20


@pytest.fixture(scope="module")
def busy_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """slow: one row at a time, some 30 ms each."""
    root = tmp_path_factory.mktemp("busy")
    graphs.publish_slow(root, products=1)
    return root


def load(served: Running, folder: Path, *arguments: str, seconds: float, deadline_s: float = 10.0) -> StepResult:
    """One step of `rafaga load`; one answer in ten is checked."""
    path = folder / "run.json"
    command = ["load", "--server", served.address, "--model", "slow", "--json", str(path), "--warm-up", "0.3"]
    timed = ["--duration", str(seconds), "--deadline-ms", str(deadline_s * 1e3)]
    done = subprocess.run(
        [sys.executable, "-m", "rafaga", *command, *timed, *arguments],
        capture_output=True,
        text=True,
        timeout=seconds + 120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (step,) = document.read(path).steps
    assert step.tally.wrong == 0
    return step


def answered(step: StepResult) -> float:
    """Per second; the generator waits for nobody beyond his deadline."""
    return step.tally.ok / step.step.duration_s


@pytest.mark.parametrize("seconds", [2, pytest.param(120, marks=[pytest.mark.nightly, pytest.mark.timeout(600)])])
def test_five_times_what_it_can_take(busy_repository: Path, tmp_path: Path, seconds: int) -> None:
    """1. As much as it can take. 2. Five times that. 3. As much as it can take: nobody is refused, as before.

    The peak is the mean of the two, because machines that are shared are not equally quick all the time.
    """
    with running(busy_repository) as served:
        before = answered(load(served, tmp_path, "--concurrency", "4", seconds=min(seconds, 20) / 2))
        run_s = 1 / before
        with watching(lambda: served.metric("process_resident_memory_bytes"), 0.5) as resident:
            rate = str(round(5 * before))
            over = load(served, tmp_path, "--rate", rate, seconds=seconds, deadline_s=DEADLINE_RUNS * run_s)
        again = load(served, tmp_path, "--concurrency", "4", seconds=min(seconds, 20) / 2)
        peak = (before + answered(again)) / 2
        outcomes = over.tally.outcomes
        p50_us, p99_us = over.tally.unanswered.percentiles_us([50, 99])
        print(
            f"peak {peak:.1f}/s ({before:.1f} before), at five times {answered(over):.1f}/s "
            f"({answered(over) / peak:.2f}); "
            f"refused in {p50_us / 1e3:.1f} ms (p99 {p99_us / 1e3:.1f} ms), a run takes {run_s * 1e3:.1f} ms; "
            f"{outcomes}; resident {resident[0] / MIB:.1f} to {resident[-1] / MIB:.1f} MiB"
        )
        assert outcomes.keys() <= {OK, "QUEUE_FULL", "DEADLINE_UNREACHABLE", "DEADLINE_EXCEEDED"}
        assert sum(outcomes.values()) == over.tally.sent
        assert p50_us <= 1e6 * run_s
        # The short run shares its cores with whoever else is there.
        assert answered(over) >= (0.9 if seconds > 60 else 0.5) * peak
        if seconds > 60:
            assert p99_us <= 1e6 * run_s
            assert outcomes.get("DEADLINE_EXCEEDED", 0) <= 0.05 * outcomes[OK]  # were dropped after they had waited
        assert resident[-1] - resident[len(resident) // 4] <= 8 * MIB
        assert served.metric("rafaga_requests_in_flight") == 0
        assert again.tally.outcomes.keys() == {OK}
