"""The manifests' probes against a real server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2

from tests import bundles
from tests.deploy.rendering import KUBERNETES, Object, container, one, overlay, render, settings
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, Serve, Served, eventually, refusal
from tests.integration.valve import Valve

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def runtime() -> Object:
    (only,) = one(render(KUBERNETES / "kserve"), "ClusterServingRuntime")["spec"]["containers"]
    return dict(only)


def ask(served: Served, probe: Object) -> int:
    """The health status that Kubernetes would get."""
    service = probe["grpc"].get("service", "")
    return int(served.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S).status)


@pytest.mark.parametrize("of", [lambda: container(overlay("cpu")), runtime], ids=["deployment", "kserve"])
@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe", "readinessProbe"])
def test_a_healthy_server_passes(server: Served, of: Callable[[], Object], probe: str) -> None:
    assert of()[probe]["grpc"]["port"] == 50051
    assert ask(server, of()[probe]) == SERVING


def test_a_refused_bundle_stops_the_update_and_restarts_nothing(serve: Serve, tmp_path: Path) -> None:
    bundles.publish_classifier(tmp_path)
    (bundles.publish_forecaster(tmp_path) / "model.onnx").write_bytes(b"damaged")
    served, only = serve(tmp_path), container(overlay("cpu"))
    assert ask(served, only["startupProbe"]) == SERVING
    assert ask(served, only["livenessProbe"]) == SERVING
    assert ask(served, only["readinessProbe"]) == NOT_SERVING


def test_engines_that_hang_again_and_again_end_the_process(serve: Serve, tmp_path: Path, valve: Valve) -> None:
    """1. The engine hangs, and the next one too. 2. The probes make Kubernetes restart the pod."""
    bundles.publish_classifier(tmp_path)
    served, only = serve(tmp_path, engine_timeout_s=0.2), container(overlay("cpu"))
    assert served.get("/healthz")[0] == 200
    with valve.closed():
        for _ in range(2):
            eventually(lambda: served.get("/readyz")[0] == 200, "an engine serves")
            call = served.vision.Classify.future(messages.classify(messages.random_digits(0)))
            assert refusal(lambda call=call: call.result(PATIENCE_S)).reason == "ENGINE_FAILURE"
        eventually(lambda: ask(served, only["livenessProbe"]) == NOT_SERVING, "liveness fails")
    assert served.get("/healthz")[0] == 503
    assert ask(served, only["readinessProbe"]) == NOT_SERVING


def test_a_pod_that_starts_before_the_models_becomes_ready_with_them(serve: Serve, tmp_path: Path) -> None:
    """The export Job may still be running, as in the overlay `dev`, which creates both at once."""
    config = settings(container(overlay("dev")), one(overlay("dev"), "ConfigMap"), tmp_path)
    models = tmp_path / "models"
    models.mkdir()
    served = serve(models, model_control=config.models.model_control, poll_interval_s=0.1)
    only = container(overlay("dev"))
    assert ask(served, only["startupProbe"]) == SERVING
    assert ask(served, only["readinessProbe"]) == NOT_SERVING
    bundles.publish_classifier(models)
    eventually(lambda: ask(served, only["readinessProbe"]) == SERVING, "the published model is served")


def test_probes_need_no_token(serve: Serve) -> None:
    served = serve(bearer_token_sha256=("0" * 64,))
    assert ask(served, container(overlay("cpu"))["readinessProbe"]) == SERVING
