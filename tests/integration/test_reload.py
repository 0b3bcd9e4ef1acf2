"""Models are added, changed and removed while the server runs: by polling, or by an admin."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import random
import shutil
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import psutil
import pytest
from grpc_health.v1 import health_pb2

from rafaga.errors import ModelNotFound, ModelNotReady, RafagaError, Unauthenticated
from rafaga.inference import open_inference_pb2 as pb
from rafaga.server.config.device import Device
from rafaga.server.config.settings import ModelControl
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace
from rafaga.server.engines.selection import Placement
from rafaga.server.repository import reconciler
from rafaga.v1 import catalog_pb2
from tests import bundles, plain
from tests.integration import messages
from tests.integration import open_inference as oip
from tests.integration.serving import (
    PATIENCE_S,
    Serve,
    Served,
    Stubs,
    assert_refused,
    connected,
    eventually,
    refusal,
    refusal_of,
    wait_for_queue,
)
from tests.integration.test_open_inference_clients import TRITON
from tests.integration.valve import Decoder, Valve

X = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
POLL = {"model_control": ModelControl.POLL, "poll_interval_s": 0.05}
EXPLICIT = {"model_control": ModelControl.EXPLICIT, "admin_port": 0}
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced model need not wait for late requests here."""
    monkeypatch.setattr(reconciler, "LINGER_S", 0.05)


def publish(root: Path, factor: float, version: int = 1, name: str = "scaled") -> None:
    """Atomically: into a hidden folder, then renamed."""
    file = plain.publish(root / ".beside", name, plain.scaled(factor), version)
    folder = root / name / str(version)
    if folder.exists():
        file.replace(folder / file.name)
    else:
        folder.parent.mkdir(exist_ok=True)
        file.parent.rename(folder)


def factor(stubs: Any, name: str = "scaled", version: str = "") -> tuple[float, str]:
    """The factor of the model, and the version that answered."""
    request = oip.request(name, x=X)
    request.model_version = version
    response = oip.infer(stubs, request)
    (found,) = oip.arrays(response).values()
    ratio = float(np.median(found / X))
    np.testing.assert_allclose(found, ratio * X, rtol=1e-5)
    return round(ratio, 4), response.model_version


def index(stub: Any, **fields: Any) -> dict[tuple[str, str], str]:
    models = stub.RepositoryIndex(pb.RepositoryIndexRequest(**fields), timeout=PATIENCE_S).models
    return {(m.name, m.version): m.state for m in models}


def health(served: Served, name: str = "") -> int:
    return int(served.health.Check(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE_S).status)


def failed_loads(served: Served, **labels: str) -> float:
    return served.metric("rafaga_model_load_failures_total", **labels)


@contextlib.contextmanager
def admin_of(served: Served) -> Iterator[Any]:
    with connected(f"127.0.0.1:{served.server.admin_port}") as channel:
        yield oip.stub(Stubs(channel))


def load(admin: Any, name: str, **options: Any) -> None:
    admin.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name), timeout=PATIENCE_S, **options)


def unload(admin: Any, name: str, **options: Any) -> None:
    admin.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=name), timeout=PATIENCE_S, **options)


@contextlib.contextmanager
def repeating(*calls: Callable[[], object]) -> Iterator[None]:
    """Each call again and again in a thread of its own."""
    stop = threading.Event()

    def repeat(call: Callable[[], object]) -> None:
        while not stop.is_set():
            call()

    with ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(repeat, call) for call in calls]
        try:
            yield
        finally:
            stop.set()
        for each in running:
            each.result(PATIENCE_S)


# Versions


def test_the_latest_version_is_served_by_default(serve: Serve, tmp_path: Path) -> None:
    for version in (1, 2, 10):
        publish(tmp_path, version, version)
    served = serve(tmp_path)
    assert factor(served) == (10, "10")
    assert_refused(lambda: factor(served, version="2"), ModelNotFound, "available: 10")
    assert index(oip.stub(served)) == {("scaled", "10"): "READY"}
    publish(tmp_path, 11, 11)  # changes are ignored by default
    time.sleep(0.3)
    assert factor(served) == (10, "10")
    assert served.server.admin_port is None


def test_all_versions_are_served_by_number(serve: Serve, tmp_path: Path) -> None:
    """Of up to eighteen digits: Unix times, as TensorFlow writes them, and beyond 32 bits."""
    numbers = [7, 1_700_000_000, 2**32 + 7, 10**18 - 1]
    for number, version in enumerate(numbers, 1):
        publish(tmp_path, number, version)
    (tmp_path / "digits/1699999999999").mkdir(parents=True)
    for _ in range(2):
        bundles.publish_classifier(tmp_path)  # the next numbers
    (tmp_path / "digits/1699999999999").rmdir()
    served = serve(tmp_path, model_versions=("all",))
    stub = oip.stub(served)
    listed = served.catalog.ListModels(catalog_pb2.ListModelsRequest()).models
    assert [m.version for m in listed if m.name == "scaled"] == numbers
    assert index(stub).items() >= {("scaled", str(version)): "READY" for version in numbers}.items()
    assert list(stub.ModelMetadata(pb.ModelMetadataRequest(name="scaled")).versions) == list(map(str, numbers))
    for number, version in enumerate(numbers, 1):
        assert factor(served, version=str(version)) == (number, str(version))
        assert stub.ModelReady(pb.ModelReadyRequest(name="scaled", version=str(version))).ready
        found = served.catalog.GetModel(catalog_pb2.GetModelRequest(name="scaled", version=version)).model
        assert (found.version, found.state) == (version, catalog_pb2.Model.READY)
    assert factor(served) == (4, str(10**18 - 1))
    statistics = stub.ModelStatistics(pb.ModelStatisticsRequest(name="scaled")).model_stats
    assert [(int(s.version), s.inference_stats.success.count) for s in statistics] == list(
        zip(numbers, (1, 1, 1, 2), strict=True)
    )
    (second,) = stub.ModelStatistics(pb.ModelStatisticsRequest(name="scaled", version="7")).model_stats
    assert second.version == "7"
    for asked, answered in ((0, 1), (1_700_000_000_000, 0), (1_700_000_000_001, 1)):
        answer = served.vision.Classify(messages.classify(messages.random_digits(0), version=asked))
        assert answer.model.version == 1_700_000_000_000 + answered
    assert_refused(lambda: factor(served, version="3"), ModelNotFound, "available: 7, 1700000000")
    assert_refused(lambda: factor(served, version=str(10**18)), ModelNotFound)


# Polling


def test_a_new_version_replaces_the_old_one(serve: Serve, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    served = serve(tmp_path, **POLL)
    assert factor(served) == (1, "1")
    publish(tmp_path, 2, 2)
    eventually(lambda: factor(served) == (2, "2"), "version 2 answers")
    eventually(lambda: index(oip.stub(served)) == {("scaled", "2"): "READY"}, "version 1 is gone")
    assert_refused(lambda: factor(served, version="1"), ModelNotFound)
    assert served.metric("rafaga_model_ready", model="scaled", version="2") == 1
    assert 'model="scaled",version="1"' not in served.get("/metrics")[1]  # or an alert would fire
    eventually(lambda: served.metric("rafaga_model_swap_seconds", model="scaled") > 0, "version 1 has ended")
    shutil.rmtree(tmp_path / "scaled/2")
    eventually(lambda: factor(served) == (1, "1"), "version 1 answers again")


def test_models_come_and_go(serve: Serve, tmp_path: Path) -> None:
    """1. A repository without models. 2. One is added: the server is ready. 3. Another. 4. The first is removed."""
    served = serve(tmp_path, **POLL)
    assert (served.get("/readyz")[0], health(served)) == (503, NOT_SERVING)
    publish(tmp_path, 3)
    eventually(lambda: served.get("/readyz")[0] == 200, "the server is ready")
    eventually(lambda: (health(served), health(served, "scaled")) == (SERVING, SERVING), "health reports it")
    assert factor(served) == (3, "1")
    bundles.publish_classifier(tmp_path)
    eventually(lambda: ("digits", "1") in index(oip.stub(served), ready=True), "digits is served")
    shutil.rmtree(tmp_path / "scaled")
    eventually(lambda: index(oip.stub(served)) == {("digits", "1"): "READY"}, "scaled is gone")
    assert_refused(lambda: factor(served), ModelNotFound)
    assert (health(served, "scaled"), health(served)) == (NOT_SERVING, SERVING)


def test_linked_files_are_served_and_their_changes_seen(serve: Serve, tmp_path: Path) -> None:
    """As Kubernetes mounts a ConfigMap: `model.onnx` is a link through `..data`, which an update replaces."""
    folder = tmp_path / "scaled/1"
    folder.mkdir(parents=True)

    def mount(factor: float) -> None:
        update = folder / f"..{factor}"
        update.mkdir()
        onnx.save(plain.scaled(factor), update / "model.onnx")
        (folder / "..data_tmp").symlink_to(update.name)
        (folder / "..data_tmp").replace(folder / "..data")

    mount(2)
    (folder / "model.onnx").symlink_to("..data/model.onnx")
    served = serve(tmp_path, **POLL)
    assert factor(served) == (2, "1")
    mount(3)
    eventually(lambda: factor(served) == (3, "1"), "the new file answers")


def test_a_failed_reload_changes_nothing_and_is_reported(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """1. Version 1 serves. 2. A broken version 2 is added. 3. Version 1 still serves. 4. Version 3 is good."""
    bundles.publish_classifier(tmp_path)
    served = serve(tmp_path, **POLL)
    images = messages.random_digits(0)
    staging = bundles.publish_classifier(tmp_path / ".staging")
    (staging / "bundle.json").unlink()
    staging.rename(tmp_path / "digits/2")

    eventually(lambda: failed_loads(served, model="digits") >= 1, "the load failed")
    states = {("digits", "1"): "READY", ("digits", "2"): "UNAVAILABLE"}
    eventually(lambda: index(oip.stub(served)) == states, "the index shows it")
    failed = served.catalog.GetModel(catalog_pb2.GetModelRequest(name="digits", version=2)).model
    assert (failed.state, "refused" in failed.reason) == (catalog_pb2.Model.FAILED, True)
    assert "model not served" in caplog.text
    assert served.metric("rafaga_model_ready", model="digits", version="2") == 0
    answer = served.vision.Classify(messages.classify(images))
    assert answer.model.version == 1
    assert messages.probabilities(answer) == pytest.approx(bundles.classify(images), abs=1e-5)
    assert (served.get("/readyz")[0], health(served), health(served, "digits")) == (200, SERVING, SERVING)
    time.sleep(0.3)
    assert failed_loads(served, model="digits") == 1  # not retried until its files change

    bundles.publish_classifier(tmp_path)
    eventually(lambda: served.vision.Classify(messages.classify(images)).model.version == 3, "version 3 answers")
    eventually(lambda: index(oip.stub(served)) == {("digits", "3"): "READY"}, "the others are gone")


def test_a_version_spoilt_in_place_serves_on_from_memory(serve: Serve, tmp_path: Path) -> None:
    """So does one whose repository is away."""
    root = tmp_path / "repository"
    root.mkdir()
    publish(root, 1)
    served = serve(root, **POLL)

    def model() -> Any:
        return served.catalog.GetModel(catalog_pb2.GetModelRequest(name="scaled")).model

    (root / "scaled/1/model.onnx").write_bytes(b"half of a mod")
    eventually(lambda: failed_loads(served, model="scaled") >= 1, "the load failed")
    assert factor(served) == (1, "1")
    assert (model().state, "refused" in model().reason) == (catalog_pb2.Model.READY, True)
    assert served.metric("rafaga_model_ready", model="scaled", version="1") == 1
    publish(root, 4)
    eventually(lambda: factor(served) == (4, "1"), "the next file answers")
    assert model().reason == ""
    root.rename(tmp_path / "away")
    time.sleep(0.3)
    assert factor(served) == (4, "1")
    (tmp_path / "away").rename(root)
    publish(root, 2, 2)
    eventually(lambda: factor(served) == (2, "2"), "version 2 answers")


def test_requests_of_the_old_version_are_answered_by_it(serve: Serve, tmp_path: Path) -> None:
    """1. Requests run and queue at version 1. 2. Version 2 takes over. 3. Version 1 answers its requests, then ends."""
    publish(tmp_path, 1)
    valve, loads = Valve(), count()

    def load(placement: Placement, device: Device, model: ModelToPlace) -> LoadedEngine:
        return placement.load(device, model) if next(loads) else valve.load(placement, device, model)

    served = serve(tmp_path, **POLL, max_queue_wait_ms=600_000, engine_factory=load)
    stub = oip.stub(served)
    old = weakref.ref(served.server.repository.model("scaled", 1))
    with valve.closed():
        first = stub.ModelInfer.future(oip.request("scaled", x=X))
        valve.wait_for_engine()
        others = [stub.ModelInfer.future(oip.request("scaled", x=X)) for _ in range(5)]
        wait_for_queue(served, "scaled", 10)
        publish(tmp_path, 2, 2)
        eventually(lambda: index(stub) == {("scaled", "2"): "READY"}, "version 2 has taken over")
        assert factor(served) == (2, "2")
    for future in (first, *others):
        response = future.result(PATIENCE_S)
        assert response.model_version == "1"
        np.testing.assert_allclose(oip.arrays(response)["y"], X)
    eventually(lambda: gc.collect() is not None and old() is None, "version 1 is freed")


def test_versions_change_under_load_without_one_lost_answer(serve: Serve, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    served = serve(tmp_path, **POLL)

    def ask() -> None:
        found, version = factor(served)
        assert found == int(version)

    with repeating(*[ask] * 8):
        for version in range(2, 8):
            publish(tmp_path, version, version)
            eventually(lambda version=version: factor(served) == (version, str(version)), "the next answers")
    assert served.metric("rafaga_requests_total", code="OK") == served.metric("rafaga_requests_total")


# On request


def test_an_admin_loads_and_unloads(serve: Serve, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    bundles.publish_classifier(tmp_path)
    served = serve(tmp_path, **EXPLICIT)
    assert (served.get("/readyz")[0], health(served)) == (200, SERVING)  # no model was requested
    with admin_of(served) as admin:
        assert index(oip.stub(served)) == {}
        assert index(admin) == {("digits", "1"): "UNAVAILABLE", ("scaled", "1"): "UNAVAILABLE"}
        assert_refused(lambda: factor(served), ModelNotFound)
        load(admin, "scaled")
        assert factor(served) == (1, "1")
        assert health(served, "scaled") == SERVING
        assert index(admin) == {("digits", "1"): "UNAVAILABLE", ("scaled", "1"): "READY"}
        assert index(admin, ready=True) == {("scaled", "1"): "READY"}
        load(admin, "scaled")  # nothing new
        publish(tmp_path, 2, 2)
        load(admin, "scaled")
        assert factor(served) == (2, "2")
        unload(admin, "scaled")
        assert_refused(lambda: factor(served), ModelNotFound)
        assert health(served, "scaled") == NOT_SERVING
        load(admin, "scaled")
        assert factor(served) == (2, "2")
    assert failed_loads(served) == 0


def test_models_to_start_with(serve: Serve, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    bundles.publish_classifier(tmp_path)
    for names, found in ((("scaled",), ["scaled"]), (("*",), ["digits", "scaled"])):
        served = serve(tmp_path, **EXPLICIT, load_models=names)
        assert [name for name, _ in index(oip.stub(served))] == found
    with pytest.raises(FileNotFoundError, match="no model unknown"):
        serve(tmp_path, **EXPLICIT, load_models=("unknown",))


def test_an_admin_gets_the_reason(serve: Serve, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    (tmp_path / "broken/1").mkdir(parents=True)
    (tmp_path / "broken/1/model.onnx").write_bytes(b"broken")
    served = serve(tmp_path, **EXPLICIT)
    with admin_of(served) as admin:
        for name in ("unknown", "", "../scaled", "scaled/1"):
            for change in (load, unload):
                assert_refused(lambda change=change, name=name: change(admin, name), ModelNotFound)
        for _ in range(2):
            assert str(tmp_path) not in assert_refused(lambda: load(admin, "broken"), ModelNotReady)
            assert index(admin)["broken", "1"] == "UNAVAILABLE"
        assert failed_loads(served, model="broken") == 2  # asked twice, tried twice
        publish(tmp_path, 3, name="broken")
        load(admin, "broken")
        assert factor(served, "broken") == (3, "1")

        (tmp_path / "scaled/2").mkdir()
        (tmp_path / "scaled/2/model.onnx").write_bytes(b"broken")
        shutil.move(tmp_path / "scaled/2", tmp_path / "two")
        load(admin, "scaled")
        shutil.move(tmp_path / "two", tmp_path / "scaled/2")
        assert_refused(lambda: load(admin, "scaled"), ModelNotReady, "nothing has changed")
        assert factor(served) == (1, "1")

        upload = pb.RepositoryModelLoadRequest(model_name="scaled")
        upload.parameters["file:1/model.onnx"].bytes_param = b"of mine"
        infer = oip.request("scaled", x=X)
        for call in (lambda: admin.RepositoryModelLoad(upload), lambda: admin.ModelInfer(infer)):
            assert refusal(call).code is grpc.StatusCode.UNIMPLEMENTED
    for change in (load, unload):  # on the port of everyone
        assert refusal(lambda change=change: change(oip.stub(served), "scaled")).code is grpc.StatusCode.UNIMPLEMENTED


def test_the_admin_listener_stays_on_loopback_without_a_token(serve: Serve, tmp_path: Path) -> None:
    def addresses(served: Served) -> set[str]:
        listening = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        return {c.laddr.ip.removeprefix("::ffff:") for c in listening if c.laddr.port == served.server.admin_port}

    publish(tmp_path, 1)
    hashes = (hashlib.sha256(b"secret").hexdigest(),)
    guarded = serve(tmp_path, **EXPLICIT, host="0.0.0.0", bearer_token_sha256=hashes)
    assert addresses(serve(tmp_path, **EXPLICIT, host="0.0.0.0", bearer_token_sha256="none")) == {"127.0.0.1"}
    assert addresses(guarded) != {"127.0.0.1"}
    with admin_of(guarded) as admin:
        assert_refused(lambda: load(admin, "scaled"), Unauthenticated)
        load(admin, "scaled", metadata=(("authorization", "Bearer secret"),))


def test_tritonclient_loads_and_unloads(serve: Serve, tmp_path: Path) -> None:
    if not TRITON.exists():
        pytest.skip("no .venv-triton: `make .venv-triton` installs Triton's client")
    publish(tmp_path, 1)
    served = serve(tmp_path, **EXPLICIT)
    script = "import sys, tritonclient.grpc as t; c = t.InferenceServerClient(sys.argv[1]); c.load_model('scaled')"
    for more, states in (("", {("scaled", "1"): "READY"}), ("; c.unload_model('scaled')", {})):
        command = [str(TRITON), "-c", script + more, f"127.0.0.1:{served.server.admin_port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert index(oip.stub(served)) == states


def test_many_load_and_unload_while_many_ask(serve: Serve, tmp_path: Path) -> None:
    """Answers are correct. Errors say that the model is missing or loading, never that the server stops."""
    expected = {f"scaled-{number}": 2 + number for number in range(4)}
    for name, number in expected.items():
        publish(tmp_path, number, name=name)
    served = serve(tmp_path, **EXPLICIT, load_models=("*",))
    changed: list[str] = []
    answered: list[str] = []
    refusals: set[tuple[str, str | None, bool]] = set()

    def change() -> None:
        name = random.choice(list(expected))
        try:
            random.choice((load, unload))(admin, name)
            changed.append(name)
        except grpc.RpcError as error:
            refusals.add(("change", refusal_of(error).reason, False))

    def ask() -> None:
        name = random.choice(list(expected))
        try:
            assert factor(served, name) == (expected[name], "1")
            answered.append(name)
        except grpc.RpcError as error:
            refused = refusal_of(error)
            refusals.add(("ask", refused.reason, "is loading" in refused.message))

    with admin_of(served) as admin:
        with repeating(*[change, ask] * 32):
            eventually(lambda: len(changed) > 200 and len(answered) > 200, "many changes and answers")
        for name in expected:
            load(admin, name)
            assert factor(served, name) == (expected[name], "1")
    missing = {(call, "MODEL_NOT_FOUND", False) for call in ("change", "ask")}
    assert refusals <= missing | {("ask", "MODEL_NOT_READY", True)}
    assert served.in_flight == 0


@pytest.mark.parametrize("replaced", [False, True], ids=["unloaded", "replaced"])
def test_a_request_whose_model_goes_while_its_image_is_decoded(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """After an unload it fails for good. After a replacement a retry reaches the new version."""
    bundles.publish_classifier(tmp_path)
    settings = POLL if replaced else EXPLICIT | {"load_models": ("*",)}
    served, decoder = serve(tmp_path, **settings), Decoder(monkeypatch)
    late = served.vision.Classify.future(messages.classify_files(b"not looked at"))
    decoder.wait_for_image()
    if replaced:
        bundles.publish_classifier(tmp_path)
        eventually(lambda: served.metric("rafaga_model_swap_seconds", model="digits") > 0, "version 1 has ended")
    else:
        with admin_of(served) as admin:
            unload(admin, "digits")
    decoder.go_on()
    error: type[RafagaError] = ModelNotReady if replaced else ModelNotFound
    assert_refused(lambda: late.result(PATIENCE_S), error, "again" if replaced else "unloaded")
    if replaced:
        assert served.vision.Classify(messages.classify_files(b"again"), timeout=PATIENCE_S).model.version == 2


def test_unloading_frees_the_memory(serve: Serve, tmp_path: Path) -> None:
    """Weights of 64 MiB, loaded and unloaded three times."""
    weights = np.random.default_rng(0).normal(size=(4096, 4096)).astype(np.float32)
    large = plain.model("(float[batch,4096] x) => (float[batch,4096] y) { y = MatMul(x, w) }", w=weights)
    plain.publish(tmp_path, "large", large)
    served = serve(tmp_path, **EXPLICIT, max_batch_size=2)
    process, resident = psutil.Process(), []
    del large, weights
    with admin_of(served) as admin:
        for _ in range(3):
            load(admin, "large")
            model = weakref.ref(served.server.repository.model("large", 0))
            loaded = process.memory_info().rss
            unload(admin, "large")
            assert not [t for t in threading.enumerate() if t.name == "engine-large"]
            eventually(lambda model=model: gc.collect() is not None and model() is None, "the model is freed")
            resident.append(process.memory_info().rss)
            assert loaded - resident[-1] > 48 * 2**20
    assert resident[-1] - resident[0] < 48 * 2**20
