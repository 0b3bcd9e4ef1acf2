"""An engine that prepares the next batch while one runs: which batches are submitted early, answered and failed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from rafaga.errors import EngineFailure, ModelNotReady
from rafaga.server.engines.contract import PendingOutputs
from rafaga.server.execution.supervisor import SupervisorPolicy
from tests.unit.server.execution.fakes import WAIT_S, FakeEngine, Served, eventually

SOON = SupervisorPolicy(timeout_s=0.3, slowness=1.0, first_delay_s=0.01)


@pytest.fixture
def served(start: Callable[..., Served]) -> Served:
    return start(depth=2, batch=4)


def test_a_full_batch_is_submitted_while_another_runs(served: Served) -> None:
    first = served.hold()
    others = [served.submit(n) for n in (10, 11, 12, 14)]
    eventually(lambda: served.engine.submitted == [[0], [10, 11, 12, 14]])
    assert served.engine.batches == [[0]], "it waits behind the one that runs"
    served.engine.gate.set()
    assert all(caller.answered() for caller in (first, *others))


def test_a_batch_that_is_not_full_is_left_to_grow(served: Served) -> None:
    first = served.hold()
    others = [served.submit(n) for n in (10, 11, 12)]
    assert served.engine.submitted == [[0]]
    others += [served.submit(14), served.submit(15)]
    eventually(lambda: served.queued_rows == 1)
    served.engine.gate.set()
    assert all(caller.answered() for caller in (first, *others))
    assert served.engine.batches == [[0], [10, 11, 12, 14], [15]]


def test_no_more_than_one_batch_is_ahead(served: Served) -> None:
    first = served.hold()
    others = [served.submit(n) for n in range(20, 32)]
    eventually(lambda: len(served.engine.submitted) == 2)
    assert served.queued_rows == 8
    served.engine.gate.set()
    assert all(caller.answered() for caller in (first, *others))


def test_a_batch_ahead_is_answered_before_the_end(served: Served) -> None:
    first = served.hold()
    others = [served.submit(n) for n in (10, 11, 12, 14)]
    eventually(lambda: len(served.engine.submitted) == 2)
    closing = threading.Thread(target=served.model.close)
    closing.start()
    served.engine.gate.set()
    closing.join(WAIT_S)
    assert all(caller.answered() for caller in (first, *others))


def test_an_engine_that_hangs_loses_both_batches(start: Callable[..., Served]) -> None:
    """Clients must not retry the run that hangs. They may retry the batch behind it, and the next engine serves it."""
    served = start(depth=2, batch=4, supervision=SOON)
    hung = served.hang()
    behind = [served.submit(n) for n in (10, 11, 12, 14)]
    assert isinstance(hung.end(), EngineFailure)
    assert all(isinstance(caller.end(), ModelNotReady) for caller in behind)
    eventually(lambda: not served.model.down)
    assert served.submit(7).answered()
    assert len(served.all_engines) == 2


def test_a_batch_that_was_taken_and_not_yet_submitted_is_owed(start: Callable[..., Served]) -> None:
    served = start(depth=2, batch=4, supervision=SOON)
    engine, submit = served.engine, FakeEngine.submit
    hung = served.hang()
    entered = threading.Event()

    def submit_late(rows: object) -> PendingOutputs:
        entered.set()
        hung.done.wait(WAIT_S)
        return submit(engine, rows)  # type: ignore[arg-type]

    engine.submit = submit_late  # type: ignore[method-assign]
    behind = [served.submit(n) for n in (10, 11, 12, 14)]
    assert entered.wait(WAIT_S)
    assert isinstance(hung.end(), EngineFailure)
    assert all(isinstance(caller.end(), ModelNotReady) for caller in behind)
    engine.go_on.set()
    eventually(lambda: not served.model.down)
    assert served.model.idle
