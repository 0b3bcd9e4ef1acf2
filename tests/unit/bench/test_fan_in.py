"""How many requests the front takes in: servers whose model does nothing are asked, and their threads' time is told."""

from __future__ import annotations

import pytest

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


def test_the_table() -> None:
    found = [
        FanIn("native", 1, 10_000.0, 1.5, 0.8, 0.2, 0.75, (("Call.reply", 0.4), ("Router.dispatch", 0.1))),
        FanIn("native", 2, 18_000.0, 1.25, 1.4, 0.4),
    ]
    text = report(found)
    assert "| native | 1 | 10,000 | 1.00 | 1.50 | 100 | 0.80 | 0.20 | 75% |" in text
    assert "| native | 2 | 18,000 | 1.80 | 1.25 | 100 | 1.40 | 0.40 | – |" in text
    assert "native, 1: the lock was held by Call.reply 40%, Router.dispatch 10%" in text
