"""HTTP requests as calls: deadlines, disconnects, priorities, tokens, limits, overload and drain, as over gRPC."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2

from rafaga.inference import open_inference_pb2 as pb
from rafaga.server.app import build
from rafaga.server.config.settings import Config
from tests import bundles
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.rest import head, raw_connection, send
from tests.integration.serving import PATIENCE_S, Serve, Served, connected, eventually, serving, wait_for_queue
from tests.integration.valve import Valve

DIGIT = messages.png(messages.random_digits(0)[0, :, :, 0])
CLASSIFY = "/v1/models/digits:classify"
METHOD = "/rafaga.v1.Vision/Classify"
TOKEN = "correct horse battery staple"
MIB = 2**20


@pytest.fixture(scope="module")
def guarded(repository: Path) -> Iterator[Served]:
    with serving(repository, bearer_token_sha256=(hashlib.sha256(TOKEN.encode()).hexdigest(),)) as served:
        yield served


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def requests(served: Served, code: str) -> float:
    return served.metric("rafaga_requests_total", method=METHOD, code=code)


class TestDeadlines:
    def test_the_header_is_the_deadline(self, serve: Serve, valve: Valve) -> None:
        """The engine holds the request; the answer comes when the deadline passes, and nothing stays in flight."""
        served = serve()
        with valve.closed():
            answer = send(served, CLASSIFY, DIGIT, Grpc_Timeout="300m")
            assert (answer.status, "timeout has passed" in answer.error) == (504, True)
            eventually(lambda: served.in_flight == 0, "the call ended")
        assert requests(served, "DEADLINE_EXCEEDED") == 1
        assert send(served, CLASSIFY, DIGIT, Grpc_Timeout="60S").status == 200

    def test_it_covers_the_body_too(self, server: Served) -> None:
        with raw_connection(server) as connection:
            connection.sendall(head(CLASSIFY, len(DIGIT), "Grpc-Timeout: 100m") + DIGIT[:10])
            assert b" 504 " in connection.recv(1000)

    @pytest.mark.parametrize("value", ["", "1", "S", "1s", "-1S", "1.5S", "123456789S", "1 S", "²S"])
    def test_a_malformed_header_is_refused(self, server: Served, value: str) -> None:
        answer = send(server, CLASSIFY, DIGIT, Grpc_Timeout=value.encode().decode("latin-1"))
        assert (answer.status, "grpc-timeout" in answer.error) == (400, True)

    def test_none_left(self, server: Served) -> None:
        assert {send(server, CLASSIFY, DIGIT, Grpc_Timeout=value).status for value in ("0m", "0S", "1n")} == {504}


def test_a_client_that_disconnects_cancels_its_request(serve: Serve, valve: Valve) -> None:
    """1. One is on the engine, one in the queue, one still sends its body. 2. All three leave. 3. Nothing stays."""
    served = serve()
    with valve.closed():
        with raw_connection(served) as running, raw_connection(served) as queued, raw_connection(served) as sending:
            running.sendall(head(CLASSIFY, len(DIGIT)) + DIGIT)
            valve.wait_for_engine()
            queued.sendall(head(CLASSIFY, len(DIGIT)) + DIGIT)
            wait_for_queue(served, "digits", 1)
            sending.sendall(head(CLASSIFY, len(DIGIT)) + DIGIT[:10])
        wait_for_queue(served, "digits", 0)
        eventually(lambda: requests(served, "CANCELLED") == 3, "all were counted")
        assert served.in_flight == 0
    assert send(served, CLASSIFY, DIGIT).status == 200


def test_a_priority_has_its_own_share(serve: Serve, valve: Valve, pool: ThreadPoolExecutor) -> None:
    served = serve(max_concurrent_calls=4)
    with valve.closed():
        normal = [pool.submit(send, served, CLASSIFY, DIGIT) for _ in range(4)]
        eventually(lambda: served.in_flight == 4, "as many as are allowed")
        assert send(served, CLASSIFY, DIGIT).status == 429
        high = pool.submit(send, served, CLASSIFY, DIGIT, Rafaga_Priority="high")
        eventually(lambda: served.in_flight == 5, "one with its own share")
    assert {future.result(PATIENCE_S).status for future in (*normal, high)} == {200}
    answer = send(served, CLASSIFY, DIGIT, Rafaga_Priority="urgent")
    assert (answer.status, "expected high, normal, low" in answer.error) == (400, True)


class TestTokens:
    def test_calls_need_one(self, guarded: Served) -> None:
        before = guarded.metric("rafaga_refusals_total", reason="UNAUTHENTICATED")
        for path, body in (
            (CLASSIFY, DIGIT),
            ("/v1/models/unknown:classify", DIGIT),
            ("/v1/models", None),
            ("/v1/models/digits", None),
            ("/v2", None),
            ("/v2/models/digits", None),
            ("/v2/models/digits/ready", None),
            ("/v2/models/digits/infer", "{"),
            ("/v2/repository/index", "{}"),
        ):
            answer = send(guarded, path, body)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert "digits" not in answer.error
            assert send(guarded, path, body, Authorization="Bearer wrong").status == 401
            assert send(guarded, path, body, Authorization=f"Bearer {TOKEN}").status != 401
        assert guarded.metric("rafaga_refusals_total", reason="UNAUTHENTICATED") == before + 18

    def test_health_metrics_and_the_description_need_none(self, guarded: Served) -> None:
        for path in ("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready", "/openapi.json"):
            assert send(guarded, path).status == 200
        described = send(guarded, "/openapi.json").json
        assert described["paths"][CLASSIFY.replace("digits", "{name}")]["post"]["security"] == [{"token": []}]

    def test_the_body_of_a_stranger_is_not_read(self, guarded: Served) -> None:
        with raw_connection(guarded) as connection:
            connection.sendall(head(CLASSIFY, MIB, "Expect: 100-continue"))
            assert b" 401 " in connection.recv(1000), "no 100 Continue"


class TestSize:
    def test_a_body_that_declares_too_much_is_not_read(self, server: Served) -> None:
        with raw_connection(server) as connection:
            connection.sendall(head(CLASSIFY, 17 * MIB, "Expect: 100-continue"))
            assert b" 413 " in connection.recv(1000)

    def test_a_body_that_declares_nothing_is_read_up_to_the_limit(self, serve: Serve) -> None:
        served = serve(max_request_bytes=MIB, max_bytes_in_flight=MIB)
        with raw_connection(served) as connection:
            connection.sendall(f"POST {CLASSIFY} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(17):
                connection.sendall(b"10000\r\n" + bytes(2**16) + b"\r\n")
            assert b" 413 " in connection.recv(1000)
        assert served.metric("rafaga_refusals_total", reason="REQUEST_TOO_LARGE") == 1

    def test_all_bodies_together_are_bounded(self, serve: Serve) -> None:
        served = serve(max_request_bytes=MIB, max_bytes_in_flight=MIB)
        large = bytes(2**17)

        def refused_beside_a_slow_one() -> bool:
            """False if this time the slow one came last and was refused itself."""
            with raw_connection(served) as slow:
                slow.sendall(head(CLASSIFY, MIB) + bytes(MIB - 100))
                answer = send(served, CLASSIFY, large)
                if answer.status != 429:
                    return False
                assert answer.headers["retry-after"] == "1"
                assert send(served, CLASSIFY, DIGIT[:50]).status == 400, "there is room for a small one"
                return True

        eventually(refused_beside_a_slow_one, "a large one was refused")
        eventually(lambda: send(served, CLASSIFY, large).status == 400, "the slow one has left")

    def test_large_bodies_are_translated_outside_the_loop(
        self, server: Served, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Health is answered while a large JSON body is."""
        held, go_on = threading.Event(), threading.Event()
        decode = msgspec.json.decode

        def slow(*args: object, **kwargs: object) -> object:
            held.set()
            assert go_on.wait(PATIENCE_S)
            return decode(*args, **kwargs)  # type: ignore[call-overload]

        monkeypatch.setattr(msgspec.json, "decode", slow)
        body = json.dumps({"history": [1.0] * 50_000})
        asked = pool.submit(send, server, "/v1/models/series:forecast", body)
        assert held.wait(PATIENCE_S)
        assert send(server, "/readyz").status == 200
        go_on.set()
        assert asked.result(PATIENCE_S).status == 200


def signals(served: Served) -> set[object]:
    """Whether the server is ready, as each signal says, and the reason: two values if they agree."""
    status = served.health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S).status
    ready = oip.stub(served).ServerReady.future(pb.ServerReadyRequest(), timeout=PATIENCE_S)
    said = ready.code() is grpc.StatusCode.OK and ready.result().ready  # while it drains, calls are UNAVAILABLE
    probe, answer = send(served, "/readyz"), send(served, "/v2/health/ready")
    reason = answer.json.get("error", "ready")
    assert probe.body.decode() == f"{reason}\n"
    over_http = {probe.status == 200, answer.status == 200, answer.json["ready"]}
    return {status == health_pb2.HealthCheckResponse.SERVING, said, reason, *over_http}


def test_every_signal_of_readiness_agrees_from_start_to_end(
    tmp_path: Path, valve: Valve, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    """1. The ports are open, and a model loads. 2. Every model is served. 3. A restart is required. 4. The server
    drains: an accepted request is finished, new ones are refused."""
    bundles.publish_classifier(tmp_path)
    loading, go_on = threading.Event(), threading.Event()

    def load(*args: object) -> object:
        loading.set()
        assert go_on.wait(PATIENCE_S)
        return valve.load(*args)  # type: ignore[arg-type]

    server = build(Config.of(repository=tmp_path, threads=("1",), grpc_port=0, http_port=0), load)  # type: ignore[arg-type]
    server.open()
    with connected(f"127.0.0.1:{server.grpc_port}") as channel:
        served = Served(server, channel, {})

        assert signals(served) == {False, "not ready: the server is starting"}
        loaded = pool.submit(server.load)
        assert loading.wait(PATIENCE_S)
        assert signals(served) == {False, "not ready: loading model digits (1 of 1)"}
        go_on.set()
        loaded.result(PATIENCE_S)
        assert signals(served) == {True, "ready"}
        with monkeypatch.context() as dead:
            dead.setattr(server.health, "_dead", True)
            assert signals(served) == {False, "not ready: a restart is required"}
            assert send(served, "/v2/health/live").status == send(served, "/healthz").status == 503
        assert signals(served) == {True, "ready"}
        with valve.closed():
            accepted = pool.submit(send, served, CLASSIFY, DIGIT)
            valve.wait_for_engine()
            stopped = pool.submit(server.drain_and_stop)
            eventually(lambda: send(served, CLASSIFY, DIGIT).status == 503, "new requests are refused")
            assert signals(served) == {False, "not ready: the server is stopping"}
            refused = send(served, CLASSIFY, DIGIT)
            assert "stopping" in refused.error
            assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
        assert accepted.result(PATIENCE_S).status == 200
        assert stopped.result(PATIENCE_S)
    with pytest.raises(OSError):
        send(served, "/readyz")
