"""A call ends once and is booked once, whatever races to end it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from rafaga.errors import InvalidRequest
from tests.unit.server.transport.fake_call import WAIT_S, Bench, FakeCall


def test_a_callback_that_raises_does_not_keep_what_the_transport_holds() -> None:
    call = FakeCall()
    call.on_cancel(lambda: 1 / 0)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        call.cancel()
    assert call.released == 1


@pytest.mark.parametrize("first", ["reply", "fail", "cancel"])
def test_the_first_end_counts(first: str) -> None:
    call = FakeCall()
    ends: dict[str, Callable[[], None]] = {
        "reply": lambda: call.reply(b"answer"),
        "fail": lambda: call.fail(InvalidRequest("no")),
        "cancel": call.cancel,
    }
    assert not call.finished
    ends[first]()
    for end in (*ends.values(), *ends.values()):
        end()
    assert call.finished
    assert len(call.sent) == (0 if first == "cancel" else 1)
    assert call.released == (1 if first == "cancel" else 0)


def test_the_callback_runs_once_if_the_call_is_cancelled() -> None:
    """At once if that has happened already, and never if the call was answered."""
    ran: list[str] = []
    before, after, answered = FakeCall(), FakeCall(), FakeCall()
    after.cancel()
    for name, call in (("before", before), ("after", after), ("answered", answered)):
        call.on_cancel(lambda name=name: ran.append(name))
    answered.reply(b"")
    for call in (before, answered, before):
        call.cancel()
    assert ran == ["after", "before"]


@pytest.mark.parametrize("seed", range(20))
def test_threads_that_race_end_it_once(seed: int) -> None:
    bench = Bench(lambda call: None)
    call = bench.ask()
    cancelled: list[int] = []
    call.on_cancel(lambda: cancelled.append(1))
    barrier = threading.Barrier(9)

    def race(end: Callable[[], None]) -> None:
        barrier.wait(WAIT_S)
        end()

    ends = [lambda: call.reply(b"yes"), lambda: call.fail(InvalidRequest("no")), call.cancel] * 3
    threads = [threading.Thread(target=race, args=(end,)) for end in ends[seed % 3 :] + ends[: seed % 3]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(call.sent) + call.released == 1
    assert len(cancelled) == call.released
    assert len(bench.settled) == 1
    assert bench.router.in_flight.count == 0
