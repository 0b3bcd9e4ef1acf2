"""The end of a server: accepted calls are answered, later ones refused, and the exit code says whether that worked."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from rafaga.inference import open_inference_pb2 as pb
from rafaga.inference import open_inference_pb2_grpc
from rafaga.v1 import catalog_pb2, vision_pb2
from tests import bundles
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, Stubs, connected, eventually, get, refusal, refusal_of
from tests.process.running import Process, Running, running

CLASSIFY = "/rafaga.v1.Vision/Classify"
DRAINING = "draining: finishing accepted calls; a second signal stops at once"
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


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM"),
        pytest.param(signal.SIGHUP, id="SIGHUP"),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.nightly),  # test_demo.py sends it too
    ],
)
def test_what_was_accepted_is_answered_and_what_comes_is_refused(slow_repository: Path, number: signal.Signals) -> None:
    """1. Twenty calls wait. 2. The signal. 3. New calls are refused. 4. The twenty are right, the exit code is 0."""
    with running(slow_repository, "--max-queue-wait-ms", "600000") as served:
        accepted = ask_slowly(served, 20)
        served.process.send(number)
        served.process.wait_for(DRAINING)
        with connected(served.address) as channel:
            late = channel.unary_unary(CLASSIFY).future(messages.classify(IMAGES[0]).SerializeToString())
            assert late.code() is grpc.StatusCode.UNAVAILABLE
            assert refusal_of(late).reason in ("DRAINING", None)  # None: the port was closed already
        for place, call in enumerate(accepted):
            assert_right(call, place)
        assert served.process.exit_code() == 0
        assert served.process.wait_for("stopped")["clean"] is True


def test_under_load_no_call_is_lost(repository: Path) -> None:
    """Sixteen callers ask without pause while the server stops: each call is answered correctly, or is UNAVAILABLE
    until the port is closed. Then the caller gives up."""
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()

    def ask_until_gone(address: str, number: int) -> None:
        with connected(address) as channel:
            method = channel.unary_unary(CLASSIFY)
            request = messages.classify(IMAGES[number % 8]).SerializeToString()
            outcome: str | None = ""
            while outcome is not None:
                call = method.future(request, timeout=PATIENCE_S)
                if call.code() is grpc.StatusCode.OK:
                    answer = messages.probabilities(vision_pb2.ClassifyResponse.FromString(call.result()))
                    right = answer == pytest.approx(bundles.classify(IMAGES[number % 8]), abs=1e-5)
                    outcome = "OK" if right else "WRONG"
                else:
                    outcome = refusal_of(call).reason
                with lock:
                    outcomes[outcome or call.code().name] += 1

    with running(repository) as served:
        with ThreadPoolExecutor(16) as pool:
            callers = pool.map(partial(ask_until_gone, served.address), range(16))
            eventually(lambda: outcomes["OK"] > 500, "the load is there")
            served.process.send(signal.SIGTERM)
        assert list(callers) == [None] * 16
        assert served.process.exit_code() == 0
        assert served.process.wait_for("stopped")["clean"] is True
    assert outcomes["UNAVAILABLE"] == 16
    assert outcomes.keys() <= {"OK", "UNAVAILABLE", "DRAINING"}


def test_every_signal_says_so_before_the_port_closes(repository: Path) -> None:
    """With a delay, balancers have time to look: nothing is ready, but calls are served and the server is alive."""
    with running(repository, "--drain-delay-s", "600") as served:
        watch = served.health.Watch(health_pb2.HealthCheckRequest())
        open_inference = open_inference_pb2_grpc.GRPCInferenceServiceStub(served.channel)

        def signals() -> tuple[object, ...]:
            checks = [health_pb2.HealthCheckRequest(service=name) for name in ("", "digits", "rafaga.v1.Catalog")]
            index = open_inference.RepositoryIndex(pb.RepositoryIndexRequest()).models
            return (
                *(served.health.Check(check).status for check in checks),
                *(get(served.http + path)[0] for path in ("/readyz", "/healthz")),
                open_inference.ServerReady(pb.ServerReadyRequest()).ready,
                open_inference.ModelReady(pb.ModelReadyRequest(name="digits")).ready,
                {model.state for model in served.catalog.ListModels(catalog_pb2.ListModelsRequest()).models},
                {model.state == "READY" for model in index},
                served.metric("rafaga_model_ready", model="digits"),
            )

        yes, no = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        assert next(watch).status == yes
        assert signals() == (yes, yes, yes, 200, 200, True, True, {catalog_pb2.Model.READY}, {True}, 1)
        served.process.send(signal.SIGTERM)
        assert next(watch).status == no
        assert signals() == (no, no, yes, 503, 200, False, False, {catalog_pb2.Model.DRAINING}, {False}, 0)
        assert get(f"{served.http}/readyz")[1] == "not ready: the server is stopping\n"
        assert served.vision.Classify(messages.classify(IMAGES[0]), timeout=PATIENCE_S).results
        assert served.process.end() == 0


@pytest.mark.parametrize("timeout", [(), ("--drain-timeout-s", "0")], ids=["a second signal", "the time limit"])
def test_a_drain_is_cut(slow_repository: Path, timeout: tuple[str, ...]) -> None:
    """Minutes of work are accepted; the server ends with most of it undone, and it says so."""
    with running(slow_repository, "--max-queue-wait-ms", "6000000", *timeout) as served:
        accepted = ask_slowly(served, 800)
        served.process.send(signal.SIGTERM)
        if not timeout:
            served.process.wait_for(DRAINING)
            served.process.send(signal.SIGTERM)
        assert served.process.exit_code() == 1
        assert served.process.wait_for("stopped")["clean"] is False
        assert served.process.wait_for("stopping with unanswered calls")["calls"] > 0
        codes = Counter(call.code() for call in accepted)
    assert codes[grpc.StatusCode.OK] < 800
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def test_a_model_that_an_admin_loads_is_not_waited_for(tmp_path: Path) -> None:
    """1. A model that runs for many seconds is to be loaded. 2. While it warms up, the server gets a signal to stop.
    3. It does, long before the load would have ended."""
    bundles.publish_slow(tmp_path, products=1000)
    with running(tmp_path, "--model-control", "explicit", "--admin-port", "0") as served:
        with connected(f"127.0.0.1:{served.admin_port}") as channel:
            admin = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            loading = admin.RepositoryModelLoad.future(pb.RepositoryModelLoadRequest(model_name="slow"))
            eventually(
                lambda: [m.state for m in admin.RepositoryIndex(pb.RepositoryIndexRequest()).models] == ["LOADING"],
                "the load has begun",
            )
            assert served.process.end() == 0
        assert loading.code() is not grpc.StatusCode.OK


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGINT, id="SIGINT"), pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.nightly)],
)
def test_a_signal_while_models_load_ends_the_server(tmp_path: Path, number: signal.Signals) -> None:
    """1. Of two models the first is loaded and the second loads, which takes minutes. 2. The ports answer: the server
    is live, but not ready, and says what it loads; the first model is served, the second refused. 3. The signal. 4. The
    server ends with exit code 0, before the second is loaded and without the drain's delay."""
    bundles.publish_classifier(tmp_path)
    bundles.publish_slow(tmp_path, products=1000)
    with Process("--repository", str(tmp_path), "--threads", "1", "--drain-delay-s", "600") as started:
        fields = started.wait_for("loading models")
        http = f"http://127.0.0.1:{fields['http_port']}"
        eventually(lambda: get(http + "/readyz") == (503, "not ready: loading model slow (2 of 2)\n"), "slow loads")
        assert get(http + "/healthz")[0] == 200

        def loading() -> list[tuple[object, ...]]:
            lines = [line.fields for line in started.log if line.fields["message"] == "loading model"]
            return [(line["model"], line["number"], line["of"]) for line in lines]

        eventually(lambda: loading() == [("digits", 1, 2), ("slow", 2, 2)], "the log says so")
        with connected(f"127.0.0.1:{fields['grpc_port']}") as channel:
            stubs = Stubs(channel)
            names = ("", "slow", "digits", "rafaga.v1.Catalog")
            checks = [stubs.health.Check(health_pb2.HealthCheckRequest(service=name)) for name in names]
            serving = [check.status == health_pb2.HealthCheckResponse.SERVING for check in checks]
            assert serving == [False, False, True, True]
            open_inference = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            assert not open_inference.ServerReady(pb.ServerReadyRequest()).ready
            assert not open_inference.ModelReady(pb.ModelReadyRequest(name="slow")).ready
            listed = {m.name: m.state for m in stubs.catalog.ListModels(catalog_pb2.ListModelsRequest()).models}
            assert listed == {"digits": catalog_pb2.Model.READY, "slow": catalog_pb2.Model.LOADING}
            assert stubs.vision.Classify(messages.classify(IMAGES[0]), timeout=PATIENCE_S).results
            refused = refusal(lambda: stubs.vision.Classify(messages.classify(IMAGES[0], "slow"), timeout=PATIENCE_S))
            assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_NOT_READY")
            assert "slow' version 1 is loading" in refused.message
            assert refused.error.retry_after_s == 1.0  # type: ignore[attr-defined]
        assert started.end(number) == 0
        assert started.line("stopping while models are loading")
        assert started.wait_for("stopped")["clean"] is True
        assert not started.line("serving")
