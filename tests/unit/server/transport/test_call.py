"""A call ends once and is booked once, whatever races to end it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from rafaga.errors import InvalidRequest
from tests.unit.server.transport.fake_call import WAIT_S, Bench, FakeCall


class TestCall:
    def test_a_callback_that_raises_does_not_keep_what_the_transport_holds(self) -> None:
        call = FakeCall()

        def fail() -> None:
            raise ValueError("a defect")

        call.on_cancel(fail)
        with pytest.raises(ValueError, match="a defect"):
            call.cancel()
        assert call.released == 1

    @pytest.mark.parametrize("first", ["reply", "fail", "cancel"])
    def test_the_first_end_counts(self, first: str) -> None:
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

    def test_cancelling_runs_the_callback_once(self) -> None:
        call, calls = FakeCall(), []
        call.on_cancel(lambda: calls.append(1))
        call.cancel()
        call.cancel()
        assert calls == [1]

    def test_a_callback_for_a_call_that_is_gone_runs_at_once(self) -> None:
        call, calls = FakeCall(), []
        call.cancel()
        call.on_cancel(lambda: calls.append(1))
        assert calls == [1]

    def test_an_answered_call_is_not_cancelled(self) -> None:
        call, calls = FakeCall(), []
        call.on_cancel(lambda: calls.append(1))
        call.reply(b"")
        call.cancel()
        assert calls == []

    @pytest.mark.parametrize("seed", range(20))
    def test_threads_that_race_end_it_once(self, seed: int) -> None:
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
