"""`rafaga plan` against real servers: measuring, planning, files, messages and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rafaga.cli import main
from rafaga.load import document
from rafaga.plan import measure, planning
from rafaga.plan import profile as profiles
from tests import bundles
from tests.integration.serving import Served, serving
from tests.integration.valve import Pace

ROW_MS = 10.0
WANTED = ("--rate", "10", "--slo-p99-ms", "5")


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A row takes 10 ms, in any batch."""
    root = tmp_path_factory.mktemp("paced")
    bundles.publish_classifier(root)
    with serving(root, Pace(ROW_MS / 1e3).load) as served:
        yield served


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures and simulates less than a plan for real would rest on."""
    monkeypatch.setattr(measure, "CALLERS", (1, 8))
    monkeypatch.setattr(measure, "WARM_UP_S", 0.1)
    monkeypatch.setattr(planning, "_SEARCH_REQUESTS", 500)
    monkeypatch.setattr(planning, "_TOLD_REQUESTS", 1000)


@pytest.mark.usefixtures("few")
def test_a_server_is_measured_and_its_profile_planned_with(
    paced: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1. Its runs are found to take what they take. 2. A plan is made at once. 3. Another is made from the file."""
    path, made = tmp_path / "digits.json", tmp_path / "plan.json"
    wanted = ["--rate", "300", "--slo-p99-ms", "500"]
    measuring = ["--measure", paced.address, "--model", "digits", "--step", "0.5", "--profile", str(path)]
    assert main(["plan", *measuring, *wanted, "--json", str(made)]) == 0
    said = capsys.readouterr()
    assert "8 callers: " in said.err
    assert "digits: " in said.out
    profile = profiles.read(path)
    assert (profile.model, profile.server, profile.max_batch_size) == ("digits", paced.address, 32)
    assert (profile.instances, profile.engine.partition(":")[0]) == (1, "onnxruntime")
    assert profile.run_ms[0] >= ROW_MS * profile.batch_rows[0]
    assert 0 < profile.crowded_rate < 1e3 / ROW_MS
    assert [(m.callers, m.offered > 0) for m in profile.steps] == [(1, False), (8, False), (0, True), (0, True)]
    plan = json.loads(made.read_text())
    assert plan["replicas"] > 300 / (1e3 / ROW_MS)
    assert plan["with_all"]["rate"] == pytest.approx(300 / plan["replicas"])
    assert plan["check"]["rate"] == pytest.approx(0.75 * profile.crowded_rate)
    assert main(["plan", "--profile", str(path), *wanted, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == plan


@pytest.mark.usefixtures("few")
def test_refused_callers_are_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundles.publish_classifier(tmp_path / "repository")
    path = tmp_path / "digits.json"
    with serving(tmp_path / "repository", Pace(ROW_MS / 1e3).load, max_batch_size=2, max_queue_requests=2) as served:
        arguments = ["--measure", served.address, "--model", "digits", "--step", "0.5", "--profile", str(path)]
        assert main(["plan", *arguments]) == 0
    assert "were refused" in capsys.readouterr().err
    assert [m.callers for m in profiles.read(path).steps if not m.offered] == [1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no profile: measure a replica"),
        (["--profile", "absent.json", *WANTED], 2, "absent.json: No such file"),
        (["--profile", "pyproject.toml", *WANTED], 2, "not a profile of rafaga plan"),
        (["--profile", "absent.json", "--rate", "10"], 2, "--rate and --slo-p99-ms go together"),
        (["--profile", "absent.json"], 2, "nothing to do"),
        (["--measure", "127.0.0.1:1", *WANTED], 2, "--measure and --model go together"),
        (["--measure", "127.0.0.1:1", "--model", "digits", *WANTED], 3, "127.0.0.1:1"),
        (["--measure", "paced", "--model", "unknown", *WANTED], 4, "no model 'unknown'"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(
    paced: Served,
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(["plan", *(paced.address if word == "paced" else word for word in arguments)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rafaga: ")
    assert message in line


def test_it_needs_the_load_extra_and_not_the_servers() -> None:
    """A plan needs nothing of the server except the batcher."""
    script = "import sys; sys.modules['hdrh'] = None; from rafaga.cli import main; sys.exit(main(['plan', '--help']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is not installed: pip install 'rafaga[load]'" in done.stderr
    assert "rafaga plan needs hdrh" in done.stderr
    script = (
        "import sys; sys.modules['onnxruntime'] = None; import rafaga.plan.command\n"
        "print(sorted(name for name in sys.modules if name.startswith('rafaga.server.')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    expected = [f"rafaga.server.scheduling{name}" for name in ("", ".batcher", ".job", ".latency")]
    assert done.stdout.strip() == str(expected)


@pytest.mark.nightly
def test_what_was_planned_is_what_callers_see(paced: Served, tmp_path: Path) -> None:
    """1. Measure. 2. Plan for one replica. 3. Load the server with that rate: its p99 is the one that was predicted."""
    path, made, run = (tmp_path / name for name in ("profile.json", "plan.json", "run.json"))
    measuring = ["--measure", paced.address, "--model", "digits", "--step", "3", "--profile", str(path)]
    assert main(["plan", *measuring, "--rate", "60", "--slo-p99-ms", "200", "--json", str(made)]) == 0
    plan = json.loads(made.read_text())
    assert plan["replicas"] == 1
    arguments = ["--server", paced.address, "--model", "digits", "--rate", "60", "--duration", "60"]
    assert main(["load", *arguments, "--slo-p99-ms", "200", "--json", str(run)]) == 0
    measured = document.read(run).steps[0].figures.latency
    print(f"p50 {measured.p50_ms:.1f} ms, planned {plan['with_all']['p50_ms']:.1f} ms")
    print(f"p99 {measured.p99_ms:.1f} ms, planned {plan['with_all']['p99_ms']:.1f} ms")
    assert measured.p50_ms == pytest.approx(plan["with_all"]["p50_ms"], rel=0.3)
    assert measured.p99_ms == pytest.approx(plan["with_all"]["p99_ms"], rel=0.3)
