"""What orchestrators and people see of a server: health, readiness, metrics, reflection, the catalogue."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from rafaga.server.transport.health import MAX_WATCHES
from rafaga.v1 import catalog_pb2
from tests import bundles
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, Serve, Served, connected, refusal

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def check(served: Served, service: str = "") -> int:
    return int(served.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S).status)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A repository with a whole model and one that changed after it was published."""
    bundles.publish_classifier(tmp_path)
    model = bundles.publish_forecaster(tmp_path) / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    return tmp_path


def test_a_server_and_its_models_are_serving(server: Served) -> None:
    assert [check(server, service) for service in ("", "digits", "backbone", "series")] == [SERVING] * 4
    assert refusal(lambda: check(server, "unknown")).code is grpc.StatusCode.NOT_FOUND
    assert (server.get("/healthz"), server.get("/readyz")) == ((200, "alive\n"), (200, "ready\n"))
    assert server.get("/other")[0] == 404


def test_watch_reports_at_once_and_when_the_server_drains_and_ends_with_it(serve: Serve) -> None:
    served = serve()
    watches = [served.health.Watch(health_pb2.HealthCheckRequest(service=service)) for service in ("", "digits")]
    assert [next(watch).status for watch in watches] == [SERVING, SERVING]
    served.server.drain_and_stop()
    assert [[response.status for response in watch] for watch in watches] == [[NOT_SERVING], [NOT_SERVING]]


def test_watches_are_bounded_and_leave_room_for_calls(serve: Serve) -> None:
    served = serve(max_concurrent_calls=2)
    watches = [served.health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S) for _ in range(MAX_WATCHES)]
    assert [next(watch).status for watch in watches] == [SERVING] * MAX_WATCHES
    one_more = served.health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    assert refusal(lambda: next(one_more)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert check(served) == SERVING
    assert served.vision.Classify(messages.classify(messages.random_digits(0))).results
    for watch in watches:
        watch.cancel()


def test_a_model_that_fails_to_load_is_not_serving_and_the_others_are(
    serve: Serve, damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(damaged)
    assert (check(served, "digits"), check(served, "series"), check(served)) == (SERVING, NOT_SERVING, NOT_SERVING)
    assert served.get("/readyz") == (
        503,
        "not ready: series version 1 is failed (the model was refused at load; see the server's log for the cause)\n",
    )
    assert "model.onnx: sha256 is" in caplog.text

    assert served.vision.Classify(messages.classify(messages.random_digits(0))).results
    refused = refusal(lambda: served.forecasting.Forecast(messages.forecast([1, 2])))
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_NOT_READY")

    models = {m.name: m for m in served.catalog.ListModels(catalog_pb2.ListModelsRequest()).models}
    assert models["digits"].state == catalog_pb2.Model.READY
    assert models["series"].state == catalog_pb2.Model.FAILED
    assert "server's log" in models["series"].reason
    assert str(damaged) not in models["series"].reason
    assert served.metric("rafaga_model_ready", model="digits") == 1
    assert served.metric("rafaga_model_ready", model="series") == 0


def test_reflection_lists_the_services_and_describes_them(server: Served) -> None:
    with connected(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = {f"rafaga.v1.{name}" for name in ("Vision", "Forecasting", "Catalog")}
        services |= {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        assert services <= set(database.get_services())
        assert database.FindFileContainingSymbol("rafaga.v1.Vision").package == "rafaga.v1"


def test_the_catalogue_lists_what_is_served(server: Served) -> None:
    models = {m.name: m for m in server.catalog.ListModels(catalog_pb2.ListModelsRequest()).models}
    assert list(models) == ["backbone", "digits", "fragile", "series"]
    digits = models["digits"]
    assert (digits.state, digits.task, digits.version) == (catalog_pb2.Model.READY, "classification", 1)
    assert (digits.trained, digits.precision, digits.max_batch_size) == (True, "fp32", 32)
    assert [(t.name, t.dtype, list(t.shape)) for t in digits.inputs] == [("image", "uint8", [-1, 28, 28, 1])]
    assert digits.image_preparation == "decoded to grey, resized to 28x28"
    info = models["series"].forecast
    assert (info.min_history, info.max_history, info.max_horizon, info.unit) == (2, 64, 4, "°C")
    one = server.catalog.GetModel(catalog_pb2.GetModelRequest(name="digits"))
    assert list(one.labels) == [f"digit {i}" for i in range(10)]
    assert one.model == digits


def test_metrics_tell_of_requests_and_batches(serve: Serve) -> None:
    served = serve()
    for rows in (1, 2, 3):
        served.vision.Classify(messages.classify(messages.random_digits(0, rows)))
    served.vision.Classify(messages.classify_files(messages.png(messages.random_digits(0)[0, :, :, 0])))
    method = {"method": "/rafaga.v1.Vision/Classify"}
    assert served.metric("rafaga_requests_total", code="OK", **method) == 4
    assert served.metric("rafaga_request_seconds_count", **method) == 4
    for name, count in (
        ("rafaga_batch_size_sum", 7),
        ("rafaga_batch_size_count", 4),
        ("rafaga_inference_seconds_count", 4),
        ("rafaga_queue_seconds_count", 4),
        ("rafaga_preprocess_seconds_count", 1),
        ("rafaga_model_ready", 1),
    ):
        assert served.metric(name, model="digits") == count, name
    assert served.metric("rafaga_requests_in_flight") == 0
    assert served.metric("process_resident_memory_bytes") > 0
