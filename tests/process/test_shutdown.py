"""The end of a server: what was accepted is answered, what comes is refused, and the exit code tells how it went."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from rafaga.inference import open_inference_pb2 as pb
from rafaga.inference import open_inference_pb2_grpc
from rafaga.v1 import vision_pb2
from tests import bundles
from tests.integration import graphs, messages
from tests.integration.serving import PATIENCE_S, connected, eventually, get, refusal_of
from tests.process.running import Running, process, running

CLASSIFY = "/rafaga.v1.Vision/Classify"
IMAGES = [messages.random_digits(seed) for seed in range(8)]


def assert_right(call: Any, number: int) -> None:
    answer = messages.probabilities(call.result(PATIENCE_S))
    assert answer == pytest.approx(bundles.classify(IMAGES[number % 8]), abs=1e-5)


def ask_slowly(served: Running, calls: int) -> list[Any]:
    """So many calls are accepted and wait for the slow model, one row at a time."""
    futures = [served.vision.Classify.future(messages.classify(IMAGES[i % 8], "slow")) for i in range(calls)]
    eventually(
        lambda: served.metric("rafaga_requests_in_flight") + served.metric("rafaga_requests_total") >= calls,
        "all were accepted",
    )
    return futures


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_what_was_accepted_is_answered_and_what_comes_is_refused(repository: Path, number: signal.Signals) -> None:
    """1. Twenty calls wait. 2. The signal. 3. New calls are refused. 4. The twenty are right, the exit code is 0."""
    with running(repository, "--max-queue-wait-ms", "600000") as served:
        accepted = ask_slowly(served, 20)
        served.process.send(number)
        served.process.wait_for("draining: finishing accepted calls; a second signal stops at once")
        with connected(served.address) as channel:
            late = channel.unary_unary(CLASSIFY).future(messages.classify(IMAGES[0]).SerializeToString())
            assert late.code() is grpc.StatusCode.UNAVAILABLE
            assert refusal_of(late).reason in ("DRAINING", None)  # None: the port was closed already
        for place, call in enumerate(accepted):
            assert_right(call, place)
        assert served.process.exit_code() == 0
        assert served.process.wait_for("stopped")["clean"] is True


def test_under_load_no_call_is_lost(repository: Path) -> None:
    """Sixteen callers ask without pause while the server stops: each call is answered rightly or refused.

    Refused is UNAVAILABLE. On grpcio, calls that arrive in the moment when it closes end as CANCELLED: a known failure.
    """
    refusals = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    outcomes: Counter[str] = Counter()
    wrong: list[object] = []
    lock = threading.Lock()

    def ask_until_gone(address: str, number: int) -> None:
        with connected(address) as channel:
            method = channel.unary_unary(CLASSIFY)
            request = messages.classify(IMAGES[number % 8]).SerializeToString()
            for _ in range(100_000):
                call = method.future(request, timeout=PATIENCE_S)
                if call.code() is not grpc.StatusCode.OK:
                    refused = refusal_of(call)
                    with lock:
                        outcomes[refused.reason or refused.code.name] += 1
                        if refused.code not in refusals:
                            wrong.append(refused)
                    return
                answer = messages.probabilities(vision_pb2.ClassifyResponse.FromString(call.result()))
                right = answer == pytest.approx(bundles.classify(IMAGES[number % 8]), abs=1e-5)
                with lock:
                    outcomes["OK"] += 1
                    if not right:
                        wrong.append(answer)

    with running(repository) as served:
        callers = [threading.Thread(target=ask_until_gone, args=(served.address, i)) for i in range(16)]
        for caller in callers:
            caller.start()
        eventually(lambda: outcomes["OK"] > 500, "the load is there")
        served.process.send(signal.SIGTERM)
        for caller in callers:
            caller.join(PATIENCE_S)
        assert served.process.exit_code() == 0
        assert served.process.wait_for("stopped")["clean"] is True
    assert not wrong
    assert sum(outcomes.values()) - outcomes["OK"] == 16


def test_health_says_so_before_the_port_closes(repository: Path) -> None:
    """With a delay, balancers have time to look: NOT_SERVING, but served."""
    with running(repository, "--drain-delay-s", "600") as served:
        watch = served.health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        served.process.send(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert served.vision.Classify(messages.classify(IMAGES[0]), timeout=PATIENCE_S).results
        served.process.send(signal.SIGTERM)
        assert served.process.exit_code() == 0


def test_a_second_signal_does_not_wait(repository: Path) -> None:
    """Minutes of work are accepted; the second signal ends the server with most of it undone, and it says so."""
    with running(repository, "--max-queue-wait-ms", "6000000") as served:
        accepted = ask_slowly(served, 100)
        served.process.send(signal.SIGTERM)
        served.process.wait_for("draining: finishing accepted calls; a second signal stops at once")
        served.process.send(signal.SIGTERM)
        assert served.process.exit_code() == 1
        assert served.process.wait_for("stopped")["clean"] is False
        assert served.process.wait_for("stopping with unanswered calls")["calls"] > 0
        codes = Counter(call.code() for call in accepted)
    assert codes[grpc.StatusCode.OK] < 100
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def test_a_drain_that_takes_too_long_is_cut(repository: Path) -> None:
    with running(repository, "--max-queue-wait-ms", "6000000", "--drain-timeout-s", "0") as served:
        accepted = ask_slowly(served, 100)
        served.process.send(signal.SIGTERM)
        assert served.process.exit_code() == 1
        assert served.process.wait_for("stopped")["clean"] is False
        assert all(call.code() is not None for call in accepted)


def test_a_model_that_an_admin_loads_is_not_waited_for(tmp_path: Path) -> None:
    """1. A model that runs for many seconds is to be loaded. 2. While it warms up, the server is told to stop. 3. It
    does, long before the load would have ended."""
    graphs.publish_slow(tmp_path, products=1000)
    with running(tmp_path, "--model-control", "explicit", "--admin-port", "0") as served:
        with connected(f"127.0.0.1:{served.admin_port}") as channel:
            admin = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            loading = admin.RepositoryModelLoad.future(pb.RepositoryModelLoadRequest(model_name="slow"))
            eventually(
                lambda: [m.state for m in admin.RepositoryIndex(pb.RepositoryIndexRequest()).models] == ["LOADING"],
                "the load has begun",
            )
            served.process.send(signal.SIGTERM)
            assert served.process.exit_code() == 0
        assert loading.code() is not grpc.StatusCode.OK


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_while_models_load_ends_the_server(tmp_path: Path, number: signal.Signals) -> None:
    """1. A model starts to load, which takes minutes; HTTP answers that the server is alive, but not ready. 2. The
    signal. 3. The server ends with exit code 0, before the model is loaded."""
    graphs.publish_slow(tmp_path, products=1000)
    ports = ("--grpc-port", "0", "--http-port", "0")
    with process("--repository", str(tmp_path), *ports, "--threads", "1") as started:
        http = f"http://127.0.0.1:{started.wait_for('loading models')['http_port']}"
        assert [get(http + path)[0] for path in ("/healthz", "/readyz")] == [200, 503]
        started.send(number)
        assert started.exit_code() == 0
        assert started.line("stopped while models were loading")
        assert not started.line("serving")
