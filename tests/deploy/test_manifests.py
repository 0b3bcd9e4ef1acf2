"""Kubernetes manifests: rendered, valid against Kubernetes' own schemas, and consistent with the server."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from models.zoo import catalogue
from rafaga.load.options import parse_load
from rafaga.server import lifecycle
from rafaga.server.config.settings import Config, ModelControl
from rafaga.server.config.sources import PREFIX, SETTINGS
from tests.deploy.rendering import (
    KUBERNETES,
    OVERLAYS,
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

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

# The oldest that supports preStop.sleep and unhealthyPodEvictionPolicy, and one of the newest.
RELEASES = ("1.30", "1.37")
CORE = ("v1", "apps/v1", "batch/v1", "policy/v1", "autoscaling/v2", "networking.k8s.io/v1")
KUSTOMIZATIONS = (*(f"overlays/{name}" for name in OVERLAYS), "export", "load", "kserve")
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


def test_every_variable_is_a_setting(objects: tuple[Object, ...]) -> None:
    known = {PREFIX + name.upper() for name in SETTINGS}
    assert {e["name"] for e in container(objects)["env"]} <= known


def test_models_and_settings_are_mounted_where_the_server_looks(objects: tuple[Object, ...], config: Config) -> None:
    mounts = {m["name"]: m for m in container(objects)["volumeMounts"]}
    assert mounts["models"]["mountPath"] == str(config.models.repository)
    assert all(m["readOnly"] for m in mounts.values())
    (claim,) = (v["persistentVolumeClaim"]["claimName"] for v in pod(objects)["volumes"] if v["name"] == "models")
    assert claim == one(render(KUBERNETES / "export"), "PersistentVolumeClaim")["metadata"]["name"]


def test_folders_are_polled_in_development_alone(tmp_path: Path) -> None:
    """Elsewhere a writer of the volume could change what is served at any time."""
    polled = set()
    for name in OVERLAYS:
        objects = overlay(name)
        config = settings(container(objects), one(objects, "ConfigMap"), tmp_path)
        if config.models.model_control is ModelControl.POLL:
            polled.add(name)
    assert polled == {"dev"}


def test_the_grace_period_covers_the_drain(objects: tuple[Object, ...], config: Config) -> None:
    stop_s = container(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_s = config.network.drain_delay_s + config.network.drain_timeout_s + lifecycle._REPLY_GRACE_S
    assert pod(objects)["terminationGracePeriodSeconds"] > stop_s + drain_s + stop_engines_s()


def test_readiness_is_lost_within_the_drain_delay_and_prestop(objects: tuple[Object, ...], config: Config) -> None:
    """Balancers that use readiness alone notice the drain while calls are still answered."""
    probe = container(objects)["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] <= config.network.drain_delay_s


def test_an_update_never_has_fewer_pods_than_before(objects: tuple[Object, ...]) -> None:
    spec = one(objects, "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert "replicas" not in spec, "applying again would undo what the autoscaler did"
    start = container(objects)["startupProbe"]
    assert spec["progressDeadlineSeconds"] > start["periodSeconds"] * start["failureThreshold"]


def job(name: str) -> Object:
    """The template of its pods."""
    template: Object = one(render(KUBERNETES / name), "Job")["spec"]["template"]
    return template


def test_every_selector_finds_the_servers_pods_and_not_the_jobs(objects: tuple[Object, ...]) -> None:
    deployment = one(objects, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    exporting = job("export")["metadata"]["labels"].items()
    selectors = [
        deployment["selector"]["matchLabels"],
        one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(objects, "NetworkPolicy", "rafaga")["spec"]["podSelector"]["matchLabels"],
        *(c["labelSelector"]["matchLabels"] for c in pod(objects)["topologySpreadConstraints"]),
        *(o["spec"]["selector"] for o in objects if o["kind"] == "Service"),
    ]
    for selector in selectors:
        assert selector.items() <= labels
        assert not selector.items() <= exporting


def test_clients_need_the_label_and_nothing_more(objects: tuple[Object, ...]) -> None:
    """A selector that also required the server's own labels would match no client."""
    rules = one(objects, "NetworkPolicy", "rafaga")["spec"]["ingress"]
    peers = next(r["from"] for r in rules if r["ports"] == [{"port": "grpc"}, {"port": "http"}])
    labels = [next(iter(peer.values()))["matchLabels"] for peer in peers]
    assert labels == [{"rafaga/client": "true"}] * 2
    assert one(objects, "NetworkPolicy", "rafaga")["spec"]["egress"] == []


def test_images_have_the_projects_version() -> None:
    tags = {"dev": VERSION, "cpu": VERSION, "gpu": f"{VERSION}-gpu"}
    assert {name: container(overlay(name))["image"] for name in tags} == {n: f"rafaga-server:{tags[n]}" for n in tags}
    for name in ("export", "load"):
        assert job(name)["spec"]["containers"][0]["image"] == f"rafaga-{name}:{VERSION}"


def test_the_load_reaches_every_pod_and_its_log_is_its_result(tmp_path: Path) -> None:
    template = job("load")
    command, *arguments = template["spec"]["containers"][0]["args"]
    assert command == "load"
    (tmp_path / "token").write_text("secret")
    options = parse_load([word.replace("/etc/rafaga-client", str(tmp_path)) for word in arguments], {})
    headless = one(overlay("cpu"), "Service", "rafaga-headless")
    assert options.connection.address == f"dns:///{headless['metadata']['name']}:{headless['spec']['ports'][0]['port']}"
    assert (options.outputs.json, options.outputs.quiet) == ("-", True)
    assert options.processes == int(template["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    (exported,) = job("export")["spec"]["containers"]
    assert options.conditions.models.keys() <= set(exported["args"])
    labels = template["metadata"]["labels"]
    rule = next(
        r
        for r in one(overlay("cpu"), "NetworkPolicy")["spec"]["ingress"]
        if r["ports"] == [{"port": "grpc"}, {"port": "http"}]
    )
    assert rule["from"][0]["podSelector"]["matchLabels"].items() <= labels.items()
    servers = one(overlay("cpu"), "Deployment")["spec"]["selector"]["matchLabels"]
    assert not servers.items() <= labels.items()


def test_the_job_exports_models_of_the_catalogue() -> None:
    (only,) = job("export")["spec"]["containers"]
    *names, output = only["args"]
    assert set(names) <= catalogue().keys()
    mounts = {m["name"]: m["mountPath"] for m in only["volumeMounts"]}
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
    only = container(component("tls"))
    config = settings(only, one(component("tls"), "ConfigMap"), tmp_path)
    mounts = {m["name"]: m["mountPath"] for m in only["volumeMounts"]}
    assert [str(config.security.tls_key), str(config.security.tls_certificate)] == [
        f"{mounts['tls']}/tls.key",
        f"{mounts['tls']}/tls.crt",
    ]
    for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert only[probe]["httpGet"] == {"path": path, "port": "http", "scheme": "HTTPS"}
        assert "grpc" not in only[probe]
    assert [port["appProtocol"] for port in one(component("tls"), "Service", "rafaga")["spec"]["ports"][1:]] == [
        "https"
    ]
    kubernetes_validate.validate(one(component("tls"), "Deployment"), RELEASES[-1], strict=True)
