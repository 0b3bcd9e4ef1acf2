"""Engines that hang, with a real server: their requests fail, health turns, and a new engine brings it back."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from rafaga.server import lifecycle
from rafaga.server.config.device import Device
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace
from rafaga.server.engines.selection import Placement
from rafaga.server.transport.completion_queue import CompletionQueueLoop
from rafaga.v1 import catalog_pb2
from tests import bundles, plain
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import PATIENCE_S, Serve, Served, eventually, refusal, serving, wait_for_queue
from tests.integration.valve import Valve

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
FOR_EVER = np.array([10**15])
X = np.array([3, 1, 2])


def ask(served: Served, x: np.ndarray = X) -> list[int]:
    response = oip.stub(served).ModelInfer(oip.request("spin", x=x), timeout=PATIENCE_S)
    return oip.arrays(response)["y"].ravel().tolist()


def spin_for_ever(served: Served) -> Any:
    """A call that the engine runs and never ends."""
    call = oip.stub(served).ModelInfer.future(oip.request("spin", x=FOR_EVER))
    eventually(lambda: served.in_flight == 1, "the call is there")
    wait_for_queue(served, "spin", 0)
    return call


def threads(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def index(served: Served, name: str) -> catalog_pb2.Model:
    return served.catalog.GetModel(catalog_pb2.GetModelRequest(name=name)).model


def test_a_run_without_end(serve: Serve, tmp_path: Path) -> None:
    """1. One call spins, two wait. 2. All fail, health turns. 3. A new engine answers, and the old one's run ended."""
    plain.publish(tmp_path, "spin", plain.spinning())
    bundles.publish_classifier(tmp_path)
    served = serve(tmp_path, engine_timeout_s=2.0, max_queue_wait_ms=600_000)
    assert ask(served) == X.tolist()
    requests = [health_pb2.HealthCheckRequest(service=service) for service in ("", "spin", "digits")]
    watches = [served.health.Watch(request, timeout=10 * PATIENCE_S) for request in requests]
    assert [next(watch).status for watch in watches] == [SERVING] * 3
    hung = spin_for_ever(served)
    waiting = [oip.stub(served).ModelInfer.future(oip.request("spin", x=X)) for _ in range(2)]

    failed = refusal(lambda: hung.result(PATIENCE_S))
    assert (failed.code, failed.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_FAILURE")
    for call in waiting:
        refused = refusal(lambda call=call: call.result(PATIENCE_S))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_NOT_READY")
    eventually(lambda: served.metric("rafaga_engine_restarts_total", model="spin") == 1, "a new engine")
    eventually(lambda: served.get("/readyz")[0] == 200, "the server is ready again")
    assert ask(served) == X.tolist()
    assert served.metric("rafaga_model_ready", model="spin") == 1
    eventually(lambda: threads("engine-spin") == 1, "ONNX Runtime ended the run of the old engine")
    for watch in watches[:2]:
        assert [next(watch).status, next(watch).status] == [NOT_SERVING, SERVING]
    served.server.drain_and_stop()
    assert [answer.status for answer in watches[2]] == [NOT_SERVING], "the other model was served all the time"


def test_while_there_is_no_engine(serve: Serve, tmp_path: Path) -> None:
    """The file is not what it was, so the new engine is refused; once it is again, the model comes back."""
    file = plain.publish(tmp_path, "spin", plain.spinning())
    bundles.publish_classifier(tmp_path)
    served = serve(tmp_path, engine_timeout_s=0.5)
    hung = spin_for_ever(served)
    whole = file.read_bytes()
    plain.publish(tmp_path, "spin", plain.identity("int64", ("batch",)))
    assert refusal(lambda: hung.result(PATIENCE_S)).reason == "ENGINE_FAILURE"
    eventually(lambda: index(served, "spin").state == catalog_pb2.Model.LOADING, "the model is down")
    assert "restarted" in index(served, "spin").reason
    refused = refusal(lambda: ask(served))
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_NOT_READY")
    assert served.get("/readyz")[0] == 503
    assert served.metric("rafaga_model_ready", model="spin") == 0
    assert not oip.stub(served).ModelReady(oip.pb.ModelReadyRequest(name="spin")).ready
    assert served.vision.Classify(messages.classify(messages.random_digits(0))).results, "other models still answer"

    file.write_bytes(whole)
    eventually(lambda: served.get("/readyz")[0] == 200, "the server is ready again")
    assert ask(served) == X.tolist()
    assert index(served, "spin").reason == ""


class Kernel:
    """One of model "held" that does not return, in whichever thread the transport has quick models run."""

    X = np.array([[1, 2, 3]], np.float32)

    def __init__(self, folder: Path) -> None:
        self.loaded: set[str] = set()
        plain.publish(folder, "held", plain.scaled(2))
        plain.publish(folder, "other", plain.scaled(3))
        self.valve = Valve(inline=True)

    def load(self, placement: Placement, device: Device, model: ModelToPlace) -> LoadedEngine:
        """An engine factory. The engine in the place of the one that hangs runs freely."""
        free = model.spec.name != "held" or "held" in self.loaded
        self.loaded.add(model.spec.name)
        return Valve(inline=True).load(placement, device, model) if free else self.valve.load(placement, device, model)

    def call(self, served: Served, model: str) -> Any:
        return oip.stub(served).ModelInfer.future(oip.request(model, x=self.X), timeout=PATIENCE_S)


def test_a_kernel_that_never_returns(serve: Serve, tmp_path: Path) -> None:
    """1. It hangs, in the transport's own thread; others call. 2. Its call fails, the others are answered.
    3. A new engine answers. 4. It returns after all: its thread ends, and serving goes on."""
    kernel = Kernel(tmp_path)
    served = serve(tmp_path, engine_factory=kernel.load, engine_timeout_s=0.5, max_queue_wait_ms=600_000)
    with kernel.valve.closed():
        hung = kernel.call(served, "held")
        kernel.valve.wait_for_engine()
        others = [kernel.call(served, "other") for _ in range(20)]
        assert refusal(hung.result).reason == "ENGINE_FAILURE"
        for call in others:
            assert (oip.arrays(call.result())["y"] == 3 * kernel.X).all()
        eventually(lambda: served.metric("rafaga_engine_restarts_total", model="held") == 1, "a new engine")
        assert (oip.arrays(kernel.call(served, "held").result())["y"] == 2 * kernel.X).all()
        eventually(lambda: served.get("/readyz")[0] == 200, "the server is ready again")
        assert served.get("/healthz")[0] == 200
        stuck = kernel.valve.thread
        assert stuck.is_alive()
        assert stuck.name == "transport"
    stuck.join(PATIENCE_S)
    assert not stuck.is_alive()
    for name, factor in (("held", 2), ("other", 3)):
        assert (oip.arrays(kernel.call(served, name).result())["y"] == factor * kernel.X).all()
    assert served.in_flight == 0


def test_when_no_thread_can_receive_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system has no thread to replace the one that hangs: liveness fails, so that the process is restarted."""
    kernel = Kernel(tmp_path)
    with serving(tmp_path, kernel.load, engine_timeout_s=0.5) as served:

        def exhausted(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(CompletionQueueLoop, "_begin", exhausted)
        alive = health_pb2.HealthCheckRequest(service="rafaga.v1.Catalog")
        assert served.health.Check(alive, timeout=PATIENCE_S).status == SERVING
        with kernel.valve.closed():
            hung = kernel.call(served, "held")
            kernel.valve.wait_for_engine()
            eventually(lambda: served.get("/healthz")[0] == 503, "liveness fails")
            assert refusal(hung.result).reason == "ENGINE_FAILURE"


def test_a_server_stops_while_an_engine_hangs(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_REPLY_GRACE_S", 0.1)
    plain.publish(tmp_path, "spin", plain.spinning())
    served = serve(tmp_path, drain_timeout_s=0.3)
    hung = spin_for_ever(served)
    model = served.server.repository.model("spin", 0)
    close = partial(model.close, 0.1)
    monkeypatch.setattr(model, "close", lambda **_: close())
    assert not served.server.drain_and_stop()
    assert refusal(lambda: hung.result(PATIENCE_S)).code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    eventually(lambda: threads("engine-spin") == 0, "ONNX Runtime ended the run")
