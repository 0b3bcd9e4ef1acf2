"""Every command of docs/load-testing.md is run, in the order of the guide, shortened and otherwise as it stands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from rafaga.cli import main
from rafaga.load import document, search
from rafaga.plan import measure, planning
from tests import bundles
from tests.documents import ROOT, commands
from tests.integration import messages
from tests.integration.serving import Served, serving

GUIDE = "docs/load-testing.md"
# The last of two equal options counts.
QUICK = ["--duration", "0.3", "--warm-up", "0.1"]
# Callers that wait send nothing while the machine stands still: no stall may hide in a warm-up, or fill the window.
CLOSED = ["--duration", "1", "--warm-up", "0"]
# An objective is a matter of the machine: the guide's is replaced by one that none misses.
EASY = ["--slo-p99-ms", "60000"]


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Small models under the names that the guide uses."""
    root = tmp_path_factory.mktemp("guide")
    bundles.publish_classifier(root, "lenet5-mnist")
    bundles.publish_forecaster(root, "lstm-co2")
    with serving(root) as served:
        yield served


def test_every_command_of_the_guide(
    guided: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAFAGA_SERVER", guided.address)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "7.png").write_bytes(messages.png(messages.random_digits(7)[0, :, :, 0]))
    (tmp_path / "co2.csv").write_text("month,ppm\n" + "\n".join(f"1958-{i:02d},{315 + i / 10}" for i in range(36)))
    (tmp_path / "arrivals.txt").write_text("\n".join(str(i / 20) for i in range(10)))
    monkeypatch.setattr(measure, "CALLERS", (1, 4))
    monkeypatch.setattr(measure, "WARM_UP_S", 0.1)
    monkeypatch.setattr(planning, "_SEARCH_REQUESTS", 200)
    monkeypatch.setattr(planning, "_TOLD_REQUESTS", 500)
    monkeypatch.setattr(search, "_HIGHEST_RATE", 64)
    addresses = {"localhost:8080": f"127.0.0.1:{guided.server.http_port}", "localhost:50051": guided.address}
    for command in map(shlex.split, commands(GUIDE, "")):
        assert command[0] == "rafaga"
        arguments = command[1:]
        for local, served in addresses.items():
            arguments = [word.replace(local, served) for word in arguments]
        if command[1] == "plan":
            arguments += ["--step", "1"]
        elif "--find-max" in command:
            arguments += [*QUICK, "--rate", "1", "--arrivals", "constant"]
        elif "merge" not in command:
            arguments += CLOSED if "--concurrency" in command else QUICK
        if "--slo-p99-ms" in command or "merge" in command:
            arguments += EASY
        if "--mlperf" in command:
            pytest.importorskip("mlperf_loadgen", reason="LoadGen (mlcommons-loadgen) is not installed")
        code = main(arguments)
        said = capsys.readouterr()
        # So short a run is seldom valid for LoadGen, which then says so.
        invalid = "--mlperf" in command and "INVALID" in said.out
        assert code == (1 if invalid else 0), f"{shlex.join(command)}\n{said.out}\n{said.err}"
    for page in ("ramp.html", "both.html"):
        assert "<svg" in (tmp_path / page).read_text()
    assert document.read(tmp_path / "result.json").met is True
    assert json.loads((tmp_path / "plan.json").read_text())["with_all"]["within"] >= 0.99
    assert (tmp_path / "mlperf-server" / "mlperf_log_summary.txt").is_file()


def test_the_guide_names_every_exit_code() -> None:
    rows = re.findall(r"^\| (\d) \| ", (ROOT / GUIDE).read_text(), re.MULTILINE)
    assert rows == ["0", "1", "2", "3", "4"]
