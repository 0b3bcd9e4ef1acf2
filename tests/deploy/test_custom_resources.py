"""Custom resources: against their makers' schemas where an npm registry is in reach, and against what is known here.

The schemas tell types, required fields and values; fields that they do not know fail too. KServe's are those of its
SDK, and what they do not tell is checked field by field, their containers as Kubernetes' own.
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
from rafaga.server.execution.served_model import ServedModel
from tests.deploy.kserve import Definitions
from tests.deploy.rendering import KUBERNETES, ROOT, Object, component, container, one, overlay, pod, render, settings

SCHEMAS = Path(__file__).parent / "schemas"

Validate = Callable[[Object], str]


def custom() -> dict[str, Object]:
    """Those with a schema."""
    found = {
        "ServiceMonitor": one(overlay("cpu"), "ServiceMonitor"),
        "PrometheusRule": one(overlay("cpu"), "PrometheusRule"),
        "ScaledObject": one(component("keda"), "ScaledObject"),
        "GRPCRoute": one(component("gateway"), "GRPCRoute"),
    }
    return copy.deepcopy(found)


@pytest.fixture(scope="session")
def validate() -> Validate:
    """Tells what is wrong with an object, "" when nothing is."""
    if (npm := shutil.which("npm")) is None or (node := shutil.which("node")) is None:
        pytest.skip("schemas of custom resources: npm is not installed")
    place = ROOT / "build/crds"
    place.mkdir(parents=True, exist_ok=True)
    wanted = (SCHEMAS / "package.json").read_text()
    installed = place / "node_modules/.installed.json"  # a copy: what was installed for older versions is no help
    for file in SCHEMAS.iterdir():
        shutil.copy(file, place)
    if not installed.exists() or installed.read_text() != wanted:
        install = [npm, "install", "--silent", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0"]
        if subprocess.run(install, cwd=place, timeout=120, check=False).returncode:
            pytest.skip("schemas of custom resources: the npm registry is out of reach")
        installed.write_text(wanted)

    def ask(thing: Object) -> str:
        done = subprocess.run(
            [node, "validate.mjs"],
            cwd=place,
            input=json.dumps([thing]),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return str(json.loads(done.stdout)[0])

    return ask


@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule", "ScaledObject", "GRPCRoute"])
def test_it_is_valid_and_a_broken_one_would_be_noticed(kind: str, validate: Validate) -> None:
    thing = custom()[kind]
    assert validate(thing) == ""
    first = next(iter(thing["spec"]))
    broken = thing | {"spec": {**thing["spec"], first: 7}}
    assert first in validate(broken)
    unknown = copy.deepcopy(thing)
    unknown["spec"]["unheardOf"] = 7
    inner = next(v for v in unknown["spec"].values() if isinstance(v, list | dict))
    (inner[0] if isinstance(inner, list) and isinstance(inner[0], dict) else unknown["spec"])["mistyped"] = "x"
    assert "spec.unheardOf" in validate(unknown)
    assert "mistyped" in validate(unknown)


def test_the_monitor_finds_the_port_of_one_service() -> None:
    monitor = one(overlay("cpu"), "ServiceMonitor")["spec"]
    (endpoint,) = monitor["endpoints"]
    services = [o for o in overlay("cpu") if o["kind"] == "Service"]
    assert all(monitor["selector"]["matchLabels"].items() <= s["metadata"]["labels"].items() for s in services)
    with_port = [s for s in services if endpoint["port"] in {p["name"] for p in s["spec"]["ports"]}]
    assert [s["metadata"]["name"] for s in with_port] == ["rafaga"], "two would count every pod twice"


def test_keda_scales_the_deployment_and_asks_for_its_job() -> None:
    objects = component("keda")
    spec = one(objects, "ScaledObject")["spec"]
    assert spec["scaleTargetRef"]["name"] == one(objects, "Deployment")["metadata"]["name"]
    # The operator names jobs after Services.
    job = one(objects, "Service", "rafaga")["metadata"]["name"]
    assert all(f'job="{job}"' in trigger["metadata"]["query"] for trigger in spec["triggers"])


@pytest.mark.parametrize("on", ["base", "overlays/cpu", "overlays/gpu"])
def test_keda_alone_scales_the_deployment(on: str) -> None:
    """In place of the overlays' autoscaler; the base has none."""
    kinds = [o["kind"] for o in component("keda", on)]
    assert "HorizontalPodAutoscaler" not in kinds
    assert kinds.count("ScaledObject") == 1


def test_the_route_names_services_that_the_server_has(tmp_path: Path) -> None:
    spec = one(component("gateway"), "GRPCRoute")["spec"]
    router = build(Config.of(repository=tmp_path))._router
    served = {path.split("/")[1] for path in router.methods} | {health.SERVICE_NAME}
    assert {match["method"]["service"] for rule in spec["rules"] for match in rule["matches"]} == served
    (backend,) = (backend for rule in spec["rules"] for backend in rule["backendRefs"])
    assert one(component("gateway"), "Service", backend["name"])["spec"]["ports"][0]["port"] == backend["port"]


@pytest.mark.parametrize(
    ("kind", "model"),
    [("ClusterServingRuntime", "V1alpha1ServingRuntimeSpec"), ("InferenceService", "V1beta1InferenceServiceSpec")],
)
def test_kserve_knows_every_field(kind: str, model: str) -> None:
    place = ROOT / "build/kserve"
    place.mkdir(parents=True, exist_ok=True)
    definitions = Definitions(place)
    spec = copy.deepcopy(one(render(KUBERNETES / "kserve"), kind)["spec"])
    assert definitions.faults(spec, model, "spec") == []
    inner = spec["supportedModelFormats"][0] if kind == "ClusterServingRuntime" else spec["predictor"]["model"]
    inner |= {"unheardOf": 7, "name": 7}
    assert len(definitions.faults(spec, model, "spec")) == 2


def test_kserve_starts_the_server_on_what_it_downloads(tmp_path: Path) -> None:
    objects = render(KUBERNETES / "kserve")
    runtime = one(objects, "ClusterServingRuntime")["spec"]
    assert runtime.keys() <= {"annotations", "containers", "protocolVersions", "supportedModelFormats"}
    (only,) = runtime["containers"]
    assert only["name"] == "kserve-container", "KServe knows it by this name"
    assert only["image"] == container(overlay("cpu"))["image"]
    config = settings(only, None, tmp_path)
    assert config.models.repository == Path("/mnt/models"), "where KServe puts what storageUri names"
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
    engines_s = ServedModel.close.__defaults__[0]
    assert (
        predictor["terminationGracePeriodSeconds"]
        > config.network.drain_delay_s + config.network.drain_timeout_s + engines_s
    )
    assert runtime["containers"][0]["securityContext"].items() > container(overlay("cpu"))["securityContext"].items()
    assert pod(overlay("cpu"))["automountServiceAccountToken"] == predictor["automountServiceAccountToken"]
