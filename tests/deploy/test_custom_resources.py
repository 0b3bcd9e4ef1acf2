"""Custom resources: valid against their projects' schemas (nightly: they are downloaded), and consistent.

KServe publishes no schemas; its containers are validated as Kubernetes' own in test_manifests.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from grpc_health.v1 import health

from rafaga.server.app import build
from rafaga.server.config.settings import Config
from tests.deploy.rendering import (
    KUBERNETES,
    ROOT,
    Object,
    component,
    container,
    one,
    overlay,
    pod,
    render,
    settings,
    stop_engines_s,
)

SCHEMAS = Path(__file__).parent / "schemas"

Validate = Callable[[Object], str]


@pytest.fixture(scope="session")
def validate() -> Validate:
    """Returns an object's faults, "" if there are none."""
    if (npm := shutil.which("npm")) is None or (node := shutil.which("node")) is None:
        pytest.skip("schemas of custom resources: npm is not installed")
    place = ROOT / "build/crds"
    place.mkdir(parents=True, exist_ok=True)
    wanted = (SCHEMAS / "package.json").read_text()
    installed = place / "node_modules/.installed.json"  # a copy, to reinstall when versions change
    for file in SCHEMAS.iterdir():
        shutil.copy(file, place)
    if not installed.exists() or installed.read_text() != wanted:
        install = [npm, "install", "--silent", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0"]
        if subprocess.run(install, cwd=place, timeout=120, check=False).returncode:
            pytest.skip("schemas of custom resources: the npm registry is out of reach")
        installed.write_text(wanted)

    def ask(thing: Object) -> str:
        given = json.dumps([thing])
        done = subprocess.run(
            [node, "validate.mjs"], cwd=place, input=given, capture_output=True, text=True, check=True
        )
        return str(json.loads(done.stdout)[0])

    return ask


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule", "ScaledObject", "GRPCRoute"])
def test_it_is_valid_and_an_invalid_one_is_found(kind: str, validate: Validate) -> None:
    objects = (*overlay("cpu"), *component("keda"), *component("gateway"))
    thing = copy.deepcopy(next(o for o in objects if o["kind"] == kind))
    assert validate(thing) == ""
    first = next(iter(thing["spec"]))
    assert first in validate(thing | {"spec": {**thing["spec"], first: 7}})
    thing["spec"]["unheardOf"] = 7
    assert "spec.unheardOf" in validate(thing)


def test_the_monitor_finds_the_port_of_one_service() -> None:
    monitor = one(overlay("cpu"), "ServiceMonitor")["spec"]
    (endpoint,) = monitor["endpoints"]
    services = [o for o in overlay("cpu") if o["kind"] == "Service"]
    assert all(monitor["selector"]["matchLabels"].items() <= s["metadata"]["labels"].items() for s in services)
    with_port = [s for s in services if endpoint["port"] in {p["name"] for p in s["spec"]["ports"]}]
    assert [s["metadata"]["name"] for s in with_port] == ["rafaga"], "with two, every pod would be counted twice"


def test_keda_scales_the_deployment_and_asks_for_its_job() -> None:
    objects = component("keda")
    spec = one(objects, "ScaledObject")["spec"]
    assert spec["scaleTargetRef"]["name"] == one(objects, "Deployment")["metadata"]["name"]
    # The operator names jobs after Services.
    job = one(objects, "Service", "rafaga")["metadata"]["name"]
    assert all(f'job="{job}"' in trigger["metadata"]["query"] for trigger in spec["triggers"])


@pytest.mark.parametrize("on", ["base", "overlays/cpu"])
def test_keda_alone_scales_the_deployment(on: str) -> None:
    """It replaces the overlays' autoscaler; the base has none."""
    kinds = [o["kind"] for o in component("keda", on)]
    assert "HorizontalPodAutoscaler" not in kinds
    assert kinds.count("ScaledObject") == 1


def test_the_route_names_services_that_the_server_has(tmp_path: Path) -> None:
    spec = one(component("gateway"), "GRPCRoute")["spec"]
    router = build(Config.of(repository=tmp_path)).router
    served = {path.split("/")[1] for path in router.methods} | {health.SERVICE_NAME}
    assert {match["method"]["service"] for rule in spec["rules"] for match in rule["matches"]} == served
    (backend,) = (backend for rule in spec["rules"] for backend in rule["backendRefs"])
    assert one(component("gateway"), "Service", backend["name"])["spec"]["ports"][0]["port"] == backend["port"]


def test_kserve_starts_the_server_on_what_it_downloads(tmp_path: Path) -> None:
    objects = render(KUBERNETES / "kserve")
    runtime = one(objects, "ClusterServingRuntime")["spec"]
    assert runtime.keys() <= {"annotations", "containers", "protocolVersions", "supportedModelFormats"}
    (only,) = runtime["containers"]
    assert only["name"] == "kserve-container", "the name that KServe requires"
    assert only["image"] == container(overlay("cpu"))["image"]
    config = settings(only, None, tmp_path)
    assert config.models.repository == Path("/mnt/models"), "where KServe mounts storageUri"
    (port,) = only["ports"]
    assert (port["name"], port["containerPort"]) == ("h2c", config.network.grpc_port)
    assert runtime["annotations"]["prometheus.kserve.io/port"] == str(config.network.http_port)
    assert runtime["protocolVersions"] == ["grpc-v2"], "the Open Inference Protocol over gRPC"


def test_kserves_service_asks_for_that_runtime_and_gives_it_time_to_drain(tmp_path: Path) -> None:
    objects = render(KUBERNETES / "kserve")
    runtime = one(objects, "ClusterServingRuntime")["spec"]
    predictor = one(objects, "InferenceService")["spec"]["predictor"]
    (model,) = runtime["supportedModelFormats"]
    assert predictor["model"]["modelFormat"].items() <= model.items()
    assert predictor["model"]["protocolVersion"] in runtime["protocolVersions"]
    claim = one(render(KUBERNETES / "export"), "PersistentVolumeClaim")["metadata"]["name"]
    assert predictor["model"]["storageUri"] == f"pvc://{claim}"
    config = settings(runtime["containers"][0], None, tmp_path)
    assert (
        predictor["terminationGracePeriodSeconds"]
        > config.network.drain_delay_s + config.network.drain_timeout_s + stop_engines_s()
    )
    assert runtime["containers"][0]["securityContext"].items() > container(overlay("cpu"))["securityContext"].items()
    assert pod(overlay("cpu"))["automountServiceAccountToken"] == predictor["automountServiceAccountToken"]
