"""Every pod of the manifests meets Kubernetes' Pod Security Standard `restricted`, and some rules of our own.

The manifests are stricter than the standard: what it restricts is fixed to one value, or not used at all.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.deploy.rendering import KUBERNETES, OVERLAYS, Object, component, container, job, one, overlay, pod, render

# Fields, anywhere in a pod, whose use the standard restricts, and capabilities that are added.
UNUSED = {
    *("windowsOptions", "hostNetwork", "hostPID", "hostIPC", "privileged", "hostPort", "host", "appArmorProfile"),
    *("seLinuxOptions", "procMount", "sysctls", "add", "initContainers", "ephemeralContainers"),
}
VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
# Of each container, which has the pod's value unless it sets its own.
CONTEXT: Object = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}
TOKENS = "RAFAGA_BEARER_TOKEN_SHA256"


def of_kserve() -> Object:
    """KServe puts the runtime's containers unchanged into the predictor's pod."""
    objects = render(KUBERNETES / "kserve")
    predictor = one(objects, "InferenceService")["spec"]["predictor"]
    runtime = one(objects, "ClusterServingRuntime")["spec"]["containers"]
    return {**{k: v for k, v in predictor.items() if k != "model"}, "containers": runtime}


PODS: dict[str, Callable[[], Object]] = {
    **{name: lambda name=name: pod(overlay(name)) for name in OVERLAYS},
    **{name: lambda name=name: job(name)["spec"] for name in ("export", "load")},
    **{name: lambda name=name: pod(component(name)) for name in ("tls", "no-tokens")},
    "tensorrt": lambda: pod(component("tensorrt", on="overlays/gpu")),
    "kserve": of_kserve,
}


def fields(thing: Any) -> Iterator[str]:
    """The keys of all objects inside."""
    for each in thing.values() if isinstance(thing, dict) else thing:
        if isinstance(each, dict | list):
            yield from fields(each)
    if isinstance(thing, dict):
        yield from thing


@pytest.mark.parametrize("name", PODS)
def test_every_pod_is_restricted_and_has_no_identity(name: str) -> None:
    spec = PODS[name]()
    assert not UNUSED & set(fields(spec))
    assert {kind for volume in spec.get("volumes", ()) for kind in volume} <= VOLUMES | {"name"}
    assert spec["automountServiceAccountToken"] is False
    assert name == "kserve" or spec["enableServiceLinks"] is False
    shared = spec.get("securityContext", {})
    assert all(value == CONTEXT.get(field, value) for field, value in shared.items())
    for each in spec["containers"]:
        context = {**shared, **each["securityContext"]}
        assert {field: context.get(field) for field in CONTEXT} == CONTEXT
        assert each["resources"]["limits"].keys() >= {"cpu", "memory"}, "the server counts its cores by the limit"


def test_a_policy_covers_the_servers_and_the_export() -> None:
    """Nothing connects to the Job. It reaches names and public addresses: no pod, no node, no metadata service."""
    policy = one(render(KUBERNETES / "export"), "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= job("export")["metadata"]["labels"].items()
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["ingress"] == []
    dns, https = policy["egress"]
    assert {port["port"] for port in dns["ports"]} == {53}
    assert [port["port"] for port in https["ports"]] == [443]
    private = ("10.1.2.3", "100.64.0.1", "169.254.169.254", "172.20.0.1", "192.168.1.1", "fd00:ec2::254", "fe80::1")
    for peer in https["to"]:
        whole, *excluded = map(ipaddress.ip_network, (peer["ipBlock"]["cidr"], *peer["ipBlock"]["except"]))
        for address in map(ipaddress.ip_address, private):
            assert address.version != whole.version or any(address in network for network in excluded)


def test_servers_need_tokens_or_say_none() -> None:
    """Without the Secret, or with an empty one, no pod starts."""
    variables = {name: {e["name"]: e for e in container(overlay(name))["env"]}[TOKENS] for name in OVERLAYS}
    assert variables.pop("dev") == {"name": TOKENS, "value": "none"}
    assert [each["valueFrom"]["secretKeyRef"]["optional"] for each in variables.values()] == [False, False]
    assert "--bearer-token-sha256=none" in of_kserve()["containers"][0]["args"]
