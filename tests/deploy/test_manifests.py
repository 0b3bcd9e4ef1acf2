"""Kubernetes manifests: rendered, valid against their schemas, and consistent with the server."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from grpc_health.v1 import health

from models.zoo import catalogue
from rafaga.load.options import parse_load
from rafaga.server import lifecycle
from rafaga.server.app import build
from rafaga.server.config.settings import Config, ModelControl
from rafaga.server.config.sources import PREFIX, SETTINGS
from tests.deploy.rendering import (
    KUBERNETES,
    OVERLAYS,
    ROOT,
    Object,
    component,
    container,
    job,
    one,
    overlay,
    pod,
    render,
    settings,
    stop_engines_s,
)

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

# The oldest that supports preStop.sleep and unhealthyPodEvictionPolicy, and one of the newest.
RELEASES = ("1.30", "1.37")
CORE = ("v1", "apps/v1", "batch/v1", "policy/v1", "autoscaling/v2", "networking.k8s.io/v1")
KUSTOMIZATIONS = (*(f"overlays/{name}" for name in OVERLAYS), "export", "load", "kserve")
SCHEMAS = Path(__file__).parent / "schemas"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> tuple[Object, ...]:
    return overlay(request.param)


@pytest.fixture
def config(objects: tuple[Object, ...], tmp_path: Path) -> Config:
    return settings(container(objects), one(objects, "ConfigMap"), tmp_path)


@pytest.mark.parametrize("release", RELEASES)
def test_objects_are_valid(release: str) -> None:
    for folder in KUSTOMIZATIONS:
        core = [o for o in render(KUBERNETES / folder) if o["apiVersion"] in CORE]
        if folder == "kserve":  # KServe puts the containers of its runtime into a pod unchanged
            spec = {"containers": one(render(KUBERNETES / folder), "ClusterServingRuntime")["spec"]["containers"]}
            core.append({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec})
        assert core
        for thing in core:
            kubernetes_validate.validate(thing, release, strict=True)


def test_ports_are_those_the_server_listens_on(objects: tuple[Object, ...], config: Config) -> None:
    ports = {p["name"]: p["containerPort"] for p in container(objects)["ports"]}
    assert ports == {"grpc": config.network.grpc_port, "http": config.network.http_port}
    assert ports == {"grpc": 50051, "http": 8080}, "the defaults"
    assert not config.network.loopback
    for name in ("rafaga", "rafaga-headless"):
        for port in one(objects, "Service", name)["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    for rule in one(objects, "NetworkPolicy", "rafaga")["spec"]["ingress"]:
        assert {p["port"] for p in rule["ports"]} <= ports.keys()


def test_variables_are_settings_and_models_are_where_the_server_looks(
    objects: tuple[Object, ...], config: Config
) -> None:
    assert {e["name"] for e in container(objects)["env"]} <= {PREFIX + name.upper() for name in SETTINGS}
    mounts = {m["name"]: m for m in container(objects)["volumeMounts"]}
    assert mounts["models"]["mountPath"] == str(config.models.repository)
    assert all(m["readOnly"] for m in mounts.values())
    (claim,) = (v["persistentVolumeClaim"]["claimName"] for v in pod(objects)["volumes"] if v["name"] == "models")
    assert claim == one(render(KUBERNETES / "export"), "PersistentVolumeClaim")["metadata"]["name"]
    # Elsewhere a writer of the volume could change what is served at any time.
    assert (config.models.model_control is ModelControl.POLL) == (objects == overlay("dev"))


def test_the_grace_period_covers_the_drain(objects: tuple[Object, ...], config: Config) -> None:
    """Balancers that use readiness alone notice the drain while calls are still answered."""
    only, network = container(objects), config.network
    stop_s = only["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_s = network.drain_delay_s + network.drain_timeout_s + lifecycle._REPLY_GRACE_S
    assert pod(objects)["terminationGracePeriodSeconds"] > stop_s + drain_s + stop_engines_s()
    probe = only["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] <= network.drain_delay_s


def test_an_update_never_has_fewer_pods_than_before(objects: tuple[Object, ...]) -> None:
    spec = one(objects, "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert "replicas" not in spec, "applying again would undo what the autoscaler did"
    start = container(objects)["startupProbe"]
    assert spec["progressDeadlineSeconds"] > start["periodSeconds"] * start["failureThreshold"]


def test_every_selector_finds_the_servers_pods_and_not_the_jobs(objects: tuple[Object, ...]) -> None:
    deployment = one(objects, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    jobs = [job(name)["metadata"]["labels"].items() for name in ("export", "load")]
    selectors = [
        deployment["selector"]["matchLabels"],
        one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(objects, "NetworkPolicy", "rafaga")["spec"]["podSelector"]["matchLabels"],
        *(c["labelSelector"]["matchLabels"] for c in pod(objects)["topologySpreadConstraints"]),
        *(o["spec"]["selector"] for o in objects if o["kind"] == "Service"),
    ]
    for selector in selectors:
        assert selector.items() <= labels
        assert not any(selector.items() <= others for others in jobs)


def test_clients_need_the_label_and_nothing_more(objects: tuple[Object, ...]) -> None:
    """A selector that also required the server's own labels would match no client. The load Job is one."""
    rules = one(objects, "NetworkPolicy", "rafaga")["spec"]["ingress"]
    peers = next(r["from"] for r in rules if r["ports"] == [{"port": "grpc"}, {"port": "http"}])
    labels = [next(iter(peer.values()))["matchLabels"] for peer in peers]
    assert labels == [{"rafaga/client": "true"}] * 2
    assert labels[0].items() <= job("load")["metadata"]["labels"].items()
    assert one(objects, "NetworkPolicy", "rafaga")["spec"]["egress"] == []


def test_images_have_the_projects_version() -> None:
    tags = {"dev": VERSION, "cpu": VERSION, "gpu": f"{VERSION}-gpu"}
    assert {name: container(overlay(name))["image"] for name in tags} == {n: f"rafaga-server:{tags[n]}" for n in tags}
    for name in ("export", "load"):
        assert job(name)["spec"]["containers"][0]["image"] == f"rafaga-{name}:{VERSION}"


def test_the_jobs_export_the_catalogue_and_load_every_pod(tmp_path: Path) -> None:
    (only,) = job("load")["spec"]["containers"]
    command, *arguments = only["args"]
    assert command == "load"
    (tmp_path / "token").write_text("secret")
    options = parse_load([word.replace("/etc/rafaga-client", str(tmp_path)) for word in arguments], {})
    headless = one(overlay("cpu"), "Service", "rafaga-headless")
    assert options.connection.address == f"dns:///{headless['metadata']['name']}:{headless['spec']['ports'][0]['port']}"
    assert (options.outputs.json, options.outputs.quiet) == ("-", True)
    assert options.processes == int(only["resources"]["limits"]["cpu"])
    (exporting,) = job("export")["spec"]["containers"]
    *names, output = exporting["args"]
    assert options.conditions.models.keys() <= set(names) <= catalogue().keys()
    mounts = {m["name"]: m["mountPath"] for m in exporting["volumeMounts"]}
    assert output == f"--output={mounts['models']}"


def test_tensorrt_has_a_cache_that_outlives_its_pods_and_time_to_fill_it(tmp_path: Path) -> None:
    objects = component("tensorrt", on="overlays/gpu")
    deployment, only = one(objects, "Deployment"), container(objects)
    for thing in (deployment, one(objects, "PersistentVolumeClaim", "rafaga-tensorrt")):
        kubernetes_validate.validate(thing, RELEASES[0], strict=True)
    assert [e["value"] for e in only["env"] if e["name"] == "RAFAGA_DEVICE"] == ["tensorrt"], "and no longer cuda"
    config = settings(only, one(objects, "ConfigMap"), tmp_path)
    mounts = {m["name"]: m for m in only["volumeMounts"]}
    # A folder in the volume: the volume's root belongs to root, and the server must own the cache.
    assert str(config.engines.tensorrt_cache.parent) == mounts["tensorrt"]["mountPath"]
    assert not mounts["tensorrt"].get("readOnly")
    claims = {v["name"]: v.get("persistentVolumeClaim", {}).get("claimName") for v in pod(objects)["volumes"]}
    assert (claims["tensorrt"], claims["models"]) == ("rafaga-tensorrt", "rafaga-models")
    context = pod(objects)["securityContext"]
    assert (context["fsGroup"], context["runAsNonRoot"]) == (context["runAsGroup"], True)
    assert context["fsGroupChangePolicy"] == "OnRootMismatch", "otherwise the cache would become writable to the group"
    assert deployment["spec"]["progressDeadlineSeconds"] > 3600, "building engines takes up to an hour"


def test_tls_turns_the_probes_to_http(tmp_path: Path) -> None:
    """Kubernetes' gRPC probes do not support TLS."""
    objects = component("tls")
    only = container(objects)
    security = settings(only, one(objects, "ConfigMap"), tmp_path).security
    (folder,) = (Path(m["mountPath"]) for m in only["volumeMounts"] if m["name"] == "tls")
    assert (security.tls_key, security.tls_certificate) == (folder / "tls.key", folder / "tls.crt")
    for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert only[probe]["httpGet"] == {"path": path, "port": "http", "scheme": "HTTPS"}
        assert "grpc" not in only[probe]
    assert one(objects, "Service", "rafaga")["spec"]["ports"][1]["appProtocol"] == "https"
    kubernetes_validate.validate(one(objects, "Deployment"), RELEASES[-1], strict=True)


@pytest.fixture(scope="session")
def validate() -> Callable[[Object], str]:
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
        command = [node, "validate.mjs"]
        done = subprocess.run(command, cwd=place, input=given, capture_output=True, text=True, check=True)
        return str(json.loads(done.stdout)[0])

    return ask


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule", "ScaledObject", "GRPCRoute"])
def test_it_is_valid_and_an_invalid_one_is_found(kind: str, validate: Callable[[Object], str]) -> None:
    objects = (*overlay("cpu"), *component("keda"), *component("gateway"))
    thing = copy.deepcopy(next(o for o in objects if o["kind"] == kind))
    assert validate(thing) == ""
    thing["spec"]["unheardOf"] = 7
    assert "spec.unheardOf" in validate(thing)


def test_the_monitor_finds_the_port_of_one_service() -> None:
    monitor = one(overlay("cpu"), "ServiceMonitor")["spec"]
    (endpoint,) = monitor["endpoints"]
    services = [o for o in overlay("cpu") if o["kind"] == "Service"]
    assert all(monitor["selector"]["matchLabels"].items() <= s["metadata"]["labels"].items() for s in services)
    with_port = [s for s in services if endpoint["port"] in {p["name"] for p in s["spec"]["ports"]}]
    assert [s["metadata"]["name"] for s in with_port] == ["rafaga"], "with two, every pod would be counted twice"


@pytest.mark.parametrize("on", ["base", "overlays/cpu"])
def test_keda_alone_scales_the_deployment(on: str) -> None:
    """It replaces the overlays' autoscaler; the base has none. Jobs are named after Services."""
    objects = component("keda", on)
    assert "HorizontalPodAutoscaler" not in {o["kind"] for o in objects}
    spec = one(objects, "ScaledObject")["spec"]
    assert spec["scaleTargetRef"]["name"] == one(objects, "Deployment")["metadata"]["name"]
    scraped = one(objects, "Service", "rafaga")["metadata"]["name"]
    assert all(f'job="{scraped}"' in trigger["metadata"]["query"] for trigger in spec["triggers"])


def test_the_route_names_services_that_the_server_has(tmp_path: Path) -> None:
    spec = one(component("gateway"), "GRPCRoute")["spec"]
    router = build(Config.of(repository=tmp_path)).router
    served = {path.split("/")[1] for path in router.methods} | {health.SERVICE_NAME}
    assert {match["method"]["service"] for rule in spec["rules"] for match in rule["matches"]} == served
    (backend,) = (backend for rule in spec["rules"] for backend in rule["backendRefs"])
    assert one(component("gateway"), "Service", backend["name"])["spec"]["ports"][0]["port"] == backend["port"]


def test_kserve_starts_the_server_on_what_it_downloads_and_gives_it_time_to_drain(tmp_path: Path) -> None:
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

    predictor = one(objects, "InferenceService")["spec"]["predictor"]
    (model,) = runtime["supportedModelFormats"]
    assert predictor["model"]["modelFormat"].items() <= model.items()
    assert predictor["model"]["protocolVersion"] in runtime["protocolVersions"]
    claim = one(render(KUBERNETES / "export"), "PersistentVolumeClaim")["metadata"]["name"]
    assert predictor["model"]["storageUri"] == f"pvc://{claim}"
    stop_s = config.network.drain_delay_s + config.network.drain_timeout_s + stop_engines_s()
    assert predictor["terminationGracePeriodSeconds"] > stop_s
