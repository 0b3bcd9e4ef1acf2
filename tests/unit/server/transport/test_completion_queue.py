"""The loop against real grpcio channels: answers, quick models in its own thread, hung runs, cancellation, the end."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # the stubs leave it out

from rafaga.errors import InvalidRequest
from rafaga.server.observability.metrics import Metrics
from rafaga.server.transport import completion_queue
from rafaga.server.transport.grpc import GrpcTransport, Limits
from rafaga.server.transport.router import Authenticator, Call, Handler, Router
from tests.unit.server.transport.fake_call import METHOD, WAIT_S


class Model:
    """Answers its calls when it is run."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.ran_in: set[str] = set()

    def take(self, call: Call) -> None:
        self.calls.append(call)
        assert call.inline is not None
        call.inline(self.run_inline)

    def run_inline(self, on_hung: Callable[[], None]) -> bool:
        if not self.calls:  # ran already
            return False
        self.ran_in.add(threading.current_thread().name)
        call = self.calls.pop(0)
        call.reply(call.request)
        return bool(self.calls)


class HungModel(Model):
    """Its first run returns only when `release` is set; `give_up` does what a supervisor does meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.hangs, self.release, self.returned = threading.Event(), threading.Event(), threading.Event()

    def run_inline(self, on_hung: Callable[[], None]) -> bool:
        if self.hangs.is_set():
            return super().run_inline(on_hung)
        self.on_hung, self.hung_call = on_hung, self.calls.pop(0)
        self.hangs.set()
        self.release.wait(WAIT_S)
        self.returned.set()
        return True

    def give_up(self) -> None:
        self.hung_call.fail(InvalidRequest("hung"))
        self.on_hung()
        self.on_hung()


class Served:
    """A transport around one handler, and a client of it."""

    def __init__(self, transport: GrpcTransport, channel: grpc.Channel) -> None:
        self.transport = transport
        self.channel: Any = channel

    def __call__(self, request: bytes) -> Any:
        return self.channel.unary_unary(METHOD).future(request, timeout=WAIT_S)


@contextmanager
def serving(handler: Handler, on_death: Callable[[], None] = lambda: None, **limits: int) -> Iterator[Served]:
    router = Router({METHOD: handler}, Authenticator(()), Metrics(), 1000)
    transport = GrpcTransport("127.0.0.1:0", router, Authenticator(()), Limits(1000, **limits), on_death=on_death)
    transport.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{transport.port}") as channel:
            yield Served(transport, channel)
    finally:
        transport.close(0.0)
    assert router.in_flight.count == 0


def echo(call: Call) -> None:
    call.reply(call.request)


def test_another_version_is_served_through_the_public_interface(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert completion_queue.unsupported() is None, "this version of grpcio is known"
    monkeypatch.delattr(cygrpc, "SendMessageOperation")
    assert "SendMessageOperation" in (completion_queue.unsupported() or "")
    with serving(echo) as ask:
        monkeypatch.undo()
        assert ask(b"request").result() == b"request"
    assert len([r for r in caplog.records if "serving through its public API" in r.getMessage()]) == 1


def test_answers_from_other_threads_race_with_cancellation() -> None:
    """Replies are started while the loop begins to listen for cancellation, and while callers cancel."""

    def handle(call: Call) -> None:
        threading.Thread(target=call.reply, args=(call.request,)).start()

    with serving(handle) as ask:
        calls = [ask(str(i).encode()) for i in range(300)]
        for call in calls[::3]:
            call.cancel()
        for i, call in enumerate(calls):
            assert i % 3 == 0 or call.result() == str(i).encode()


def test_quick_models_run_in_the_loop() -> None:
    model = Model()
    with serving(model.take) as ask:
        calls = [ask(str(i).encode()) for i in range(100)]
        assert [call.result() for call in calls] == [str(i).encode() for i in range(100)]
    assert model.ran_in == {"transport"}


def test_a_run_that_raises_does_not_end_the_loop() -> None:
    class Broken(Model):
        def run_inline(self, on_hung: Callable[[], None]) -> bool:
            if self.calls[-1].request == b"good":
                return super().run_inline(on_hung)
            self.calls.pop().fail(InvalidRequest("broken"))
            raise KeyError

    model = Broken()
    with serving(model.take) as ask:
        assert ask(b"bad").code() is grpc.StatusCode.INVALID_ARGUMENT
        assert ask(b"good").result() == b"good"


def test_a_hung_run_does_not_end_the_loop() -> None:
    """1. A run hangs; others call. 2. It is given up: another thread answers the others. 3. It returns, and ends."""
    model = HungModel()
    with serving(model.take) as ask:
        hung = ask(b"hung")
        assert model.hangs.wait(WAIT_S)
        others = [ask(b"other") for _ in range(20)]
        model.give_up()
        assert hung.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert [call.result() for call in others] == [b"other"] * 20
        model.release.set()
        assert model.returned.wait(WAIT_S)
        assert ask(b"again").result() == b"again"


def test_without_another_thread_the_process_must_be_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dead = HungModel(), threading.Event()
    with serving(model.take, dead.set) as ask:
        hung = ask(b"hung")
        assert model.hangs.wait(WAIT_S)
        with monkeypatch.context() as patch:
            patch.setattr(threading, "Thread", Mock(side_effect=RuntimeError))
            model.give_up()
        assert dead.is_set()
        assert hung.code() is grpc.StatusCode.INVALID_ARGUMENT
        model.release.set()


def test_calls_in_flight_are_answered_while_the_transport_closes() -> None:
    held: list[Call] = []
    arrived = threading.Semaphore(0)

    def hold(call: Call) -> None:
        held.append(call)
        arrived.release()

    with serving(hold) as ask:
        calls = [ask(b"x") for _ in range(10)]
        for _ in calls:
            assert arrived.acquire(timeout=WAIT_S)
        closing = threading.Thread(target=ask.transport.close, args=(WAIT_S,))
        closing.start()
        for call in held:
            call.reply(b"late")
        assert [call.result() for call in calls] == [b"late"] * 10
        closing.join(WAIT_S)
        assert not closing.is_alive()


def test_uploads_that_never_end_keep_no_others_out() -> None:
    """Beyond the limit the oldest is refused. Requests that arrive in full are served all the time."""
    end = threading.Event()

    def endless() -> Iterator[bytes]:
        end.wait(WAIT_S)
        yield from ()

    with serving(echo, max_receiving_calls=4) as ask:
        uploads = [ask.channel.stream_unary(METHOD).future(endless(), timeout=WAIT_S) for _ in range(10)]
        assert ask(b"whole").result() == b"whole"
        end.set()
        codes = Counter(upload.code() for upload in uploads)
        refused = [u.details() for u in uploads if u.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED: 7, grpc.StatusCode.INVALID_ARGUMENT: 3}
    assert all("too many requests are being received" in details for details in refused)
