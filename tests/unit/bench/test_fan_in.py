"""How many requests the front takes in: servers whose model does nothing are asked, and their threads' time is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import fan_in
from bench.fan_in import FanIn, measure, report


@pytest.mark.parametrize("servers", [1, 2])
def test_every_server_is_asked_and_tells_its_time(servers: int) -> None:
    found = measure("grpcio", servers, callers=4, processes=1, seconds=1.0, profile=False)
    assert (found.transport, found.servers) == ("grpcio", servers)
    assert found.rate > 0
    assert found.p99_ms > 0
    assert found.python_cores > 0
    assert found.cpu_us == pytest.approx(1e6 * (found.python_cores + found.native_cores) / found.rate)
    assert found.held is None, "nobody was asked to look"


_SPY = """#!{python}
import signal, sys
def write(*_):
    open(sys.argv[sys.argv.index("--output") + 1], "w").write("main;one 30\\nmain;two 10\\nmain;other;one 20\\n")
    sys.exit()
signal.signal(signal.SIGINT, write)
signal.pause()
"""


def test_who_holds_the_lock_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = tmp_path / "py-spy"
    spy.write_text(_SPY.format(python=sys.executable))
    spy.chmod(0o700)
    monkeypatch.setattr(fan_in, "_PY_SPY", str(spy))
    found = measure("grpcio", 1, callers=4, processes=1, seconds=1.0, profile=True)
    assert found.by_whom == (("one", 50 / 60), ("two", 10 / 60))
    assert found.held == pytest.approx(60 / 250 / 2.0), "a second of warming up is watched too"


def test_a_spy_that_cannot_look_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = tmp_path / "py-spy"
    spy.write_text("#!/bin/sh\necho 'Permission denied: try again with root' >&2; exit 1\n")
    spy.chmod(0o700)
    monkeypatch.setattr(fan_in, "_PY_SPY", str(spy))
    with pytest.raises(RuntimeError, match="Permission denied"):
        measure("grpcio", 1, callers=1, processes=1, seconds=0.5, profile=True)


def test_profiling_needs_the_spy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fan_in, "_PY_SPY", "no-such-spy")
    monkeypatch.setattr(sys, "argv", ["fan_in", "--profile"])
    with pytest.raises(SystemExit):
        fan_in.main()
    assert "--profile needs no-such-spy" in capsys.readouterr().err


def test_the_table() -> None:
    found = [
        FanIn("native", 1, 10_000.0, 1.5, 0.8, 0.2, 0.75, (("Call.reply", 0.4), ("Router.dispatch", 0.1))),
        FanIn("native", 2, 18_000.0, 1.25, 1.4, 0.4),
    ]
    text = report(found)
    assert "| native | 1 | 10,000 | 1.00 | 1.50 | 100 | 0.80 | 0.20 | 75% |" in text
    assert "| native | 2 | 18,000 | 1.80 | 1.25 | 100 | 1.40 | 0.40 | – |" in text
    assert "native, 1: the lock was held by Call.reply 40%, Router.dispatch 10%" in text
