"""A call is admitted or refused by its metadata, dispatched with its request, and no exception leaves it unanswered."""

from __future__ import annotations

import hashlib
import time

import grpc
import pytest

from rafaga.errors import Cancelled, DeadlineExceeded, InvalidRequest, RafagaError
from rafaga.priority import PRIORITY_KEY, Priority
from rafaga.server.transport.router import Call, InFlight, Metadata
from tests.unit.server.transport.fake_call import WAIT_S, Bench, FakeCall


def echo(call: Call) -> None:
    call.reply(call.request)


class TestRouter:
    def test_a_defect_after_the_answer_changes_nothing(self) -> None:
        def answer_and_break_down(call: Call) -> None:
            call.reply(b"answer")
            raise KeyError

        bench = Bench(answer_and_break_down)
        assert bench.ask().sent == [b"answer"]
        assert bench.router.in_flight.count == 0

    def test_calls_are_in_flight_until_they_end(self) -> None:
        """Also one whose reply cannot be sent."""
        bench = Bench(lambda call: None)
        calls = [bench.ask() for _ in range(4)]
        assert bench.router.in_flight.count == 4
        calls[0].reply(b"")
        calls[1].fail(InvalidRequest("no"))
        calls[2].cancel()
        calls[3]._send = lambda _: 1 / 0  # type: ignore[method-assign, assignment]
        with pytest.raises(ZeroDivisionError):
            calls[3].reply(b"")
        assert bench.router.in_flight.count == 0

    @pytest.mark.parametrize(
        ("metadata", "priority"),
        [
            ((), Priority.NORMAL),
            (((PRIORITY_KEY, "normal"),), Priority.NORMAL),
            ((("user-agent", "x"), (PRIORITY_KEY, "high")), Priority.HIGH),
            (((PRIORITY_KEY, "low"), (PRIORITY_KEY, "high")), Priority.LOW),
        ],
    )
    def test_the_priority_is_known_before_the_handler_runs(self, metadata: Metadata, priority: Priority) -> None:
        bench = Bench(lambda call: call.reply(call.priority.word.encode()))
        assert bench.ask(b"not parsed", metadata).sent == [priority.word.encode()]

    def test_without_a_token_only_that_is_reported(self) -> None:
        bench = Bench(echo, tokens=("one",))
        assert bench.ask(b"", ((PRIORITY_KEY, "x"),)).code is grpc.StatusCode.UNAUTHENTICATED

    @pytest.mark.parametrize(("left", "error"), [(-1.0, DeadlineExceeded), (WAIT_S, Cancelled)])
    def test_a_call_whose_caller_left(self, left: float, error: type[RafagaError]) -> None:
        bench = Bench(lambda call: None)
        bench.ask(deadline=time.monotonic() + left).cancel()
        assert isinstance(bench.settled[0][1], error)

    @pytest.mark.parametrize("refused", ["token", "full", "draining", None])
    def test_before_the_request_is_received(self, refused: str | None) -> None:
        bench = Bench(echo, tokens=("one",) if refused == "token" else (), most=1)
        if refused == "full":
            bench.router.in_flight.enter(Priority.NORMAL, 0)
        if refused == "draining":
            bench.router.drain()
        call = FakeCall()
        assert bench.router.admit(call) is (refused is None)
        assert call.finished is (refused is not None)
        assert bench.router.in_flight.count == (1 if refused == "full" else 0)

    def test_too_large(self) -> None:
        bench = Bench(echo, limit=4)
        assert bench.ask(b"1234").code is grpc.StatusCode.OK
        assert bench.ask(b"12345").code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert bench.count("rafaga_refusals_total", reason="REQUEST_TOO_LARGE") == 1


class TestAuthenticator:
    @pytest.mark.parametrize(
        "metadata",
        [
            (),
            (("authorization", "Bearer three"),),
            (("authorization", "Bearer "),),
            (("authorization", "Bearer"),),
            (("authorization", "one"),),
            (("authorization", "Basic one"),),
            (("authorization", b"Bearer one"),),
            (("authorization-bin", "Bearer one"),),
            (("authorization", "Bearer one "),),
            (("authorization", "Bearer " + hashlib.sha256(b"one").hexdigest()),),
        ],
    )
    def test_everything_else(self, metadata: Metadata) -> None:
        bench = Bench(echo, tokens=("one", "two"))
        assert bench.ask(b"", metadata).code is grpc.StatusCode.UNAUTHENTICATED
        assert bench.count("rafaga_refusals_total", reason="UNAUTHENTICATED") == 1


class TestInFlight:
    @pytest.mark.parametrize("flood", Priority)
    @pytest.mark.parametrize(("limits", "size"), [({"max_calls": 8}, 0), ({"max_bytes": 800}, 100)])
    def test_a_flood_of_one_priority_leaves_each_other_its_share(
        self, flood: Priority, limits: dict[str, int], size: int
    ) -> None:
        in_flight = InFlight(**limits)
        others = set(Priority) - {flood}
        assert [in_flight.enter(flood, size) for _ in range(9)] == [True] * 8 + [False]
        in_flight.leave(flood, size)
        for other in others:
            assert [in_flight.enter(other, size) for _ in range(3)] == [True, True, False]
            in_flight.leave(other, size)
        assert in_flight.count == 12
        in_flight.leave(flood, size)
        assert not in_flight.enter(flood, size), "the shares of others are not the flood's"
        for priority in (*[flood] * 8, *others, *others):
            in_flight.leave(priority, size)
        assert in_flight.enter(flood, 8 * size), "all were given back"
