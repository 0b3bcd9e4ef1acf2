"""Several engines on one queue: they share its work, put split answers together, and are supervised one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rafaga.errors import EngineFailure
from tests.unit.server.execution.fakes import HANG, SOON, WAIT_S, Served, eventually

RESTARTS = "rafaga_engine_restarts_total"
NO_DEVICE = RuntimeError("no device")


def test_split_answers_are_whole(start: Callable[..., Served]) -> None:
    """Many at once, their parts on whichever engine is free."""
    served = start(count=2)
    callers = [served.submit(*range(n, n + 30)) for n in range(1000, 1100)]
    for caller in callers:
        assert caller.end() == [2 * n for n in caller.job.inputs[0]]
    eventually(lambda: served.model.idle)


def test_while_one_cannot_restart_the_other_is_supervised(start: Callable[..., Served]) -> None:
    """1. One hangs, and no device takes a new one. 2. The other hangs too, and is found. 3. One device comes back."""
    served = start(count=2, supervision=SOON)
    served.refusing = {0: NO_DEVICE, 1: NO_DEVICE}
    first = served.submit(HANG)
    assert isinstance(first.end(), EngineFailure)
    second = served.submit(HANG)
    assert isinstance(second.end(), EngineFailure)
    assert served.model.down
    served.refusing = {0: NO_DEVICE}
    for engine in served.engines:
        engine.go_on.set()
    eventually(lambda: not served.model.down)
    assert served.submit(1).end() == [2]


def test_a_lost_engine_does_not_count(start: Callable[..., Served]) -> None:
    """Neither in the capacity, nor in the predicted wait."""
    served = start(count=2, supervision=SOON)
    both = served.model.queue.capacity_rows_per_s()
    assert both == pytest.approx(2 * 8 / 1e-3)
    served.refusing = {0: NO_DEVICE, 1: NO_DEVICE}
    assert isinstance(served.submit(HANG).end(), EngineFailure)
    assert served.model.queue.capacity_rows_per_s() == both / 2
    (left,) = (engine for engine in served.engines if not engine.hanging.is_set())
    left.gate.clear()
    busy = served.submit(1)
    assert left.started.acquire(timeout=WAIT_S)
    waiting = served.submit(*range(80))
    assert served.model.queue.predicted_wait_s() >= 10 * 1e-3, "ten batches, for one engine"
    left.gate.set()
    assert busy.end() == [2]
    waiting.end()
    served.refusing = {}
    for engine in served.engines:
        engine.go_on.set()
    eventually(lambda: served.metric(RESTARTS) == 1)
    assert served.model.queue.capacity_rows_per_s() > 1.5 * both / 2
