"""Every pod of the manifests meets Kubernetes' Pod Security Standard `restricted`, and some rules of our own.

The table has the controls of the standard's page in its order, first those of `baseline`, which `restricted` includes.
"""

from __future__ import annotations

import copy
import ipaddress
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.deploy.rendering import KUBERNETES, OVERLAYS, Object, component, one, overlay, pod, render


def containers(spec: Object) -> list[Object]:
    return [c for kind in ("initContainers", "containers", "ephemeralContainers") for c in spec.get(kind, ())]


def contexts(spec: Object) -> Iterator[Object]:
    """The pod's and its containers'."""
    for each in (spec, *containers(spec)):
        yield each.get("securityContext", {})


def effective(spec: Object, name: str) -> list[Any]:
    """A field of each container, which has the pod's unless it sets its own."""
    shared = spec.get("securityContext", {})
    return [c.get("securityContext", {}).get(name, shared.get(name)) for c in containers(spec)]


def handlers(spec: Object) -> Iterator[Object]:
    """Probes and lifecycle hooks."""
    for each in containers(spec):
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            yield each.get(kind, {})
        yield from each.get("lifecycle", {}).values()


VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
}
SELINUX = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}

CONTROLS: dict[str, Callable[[Object], bool]] = {
    "HostProcess": lambda s: not any(c.get("windowsOptions", {}).get("hostProcess") for c in contexts(s)),
    "Host Namespaces": lambda s: not any(s.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")),
    "Privileged Containers": lambda s: not any(c.get("privileged") for c in contexts(s)),
    "HostPath Volumes": lambda s: not any("hostPath" in v for v in s.get("volumes", ())),
    "Host Ports": lambda s: not any(p.get("hostPort") for c in containers(s) for p in c.get("ports", ())),
    "Host Probes / Lifecycle Hooks": lambda s: (
        not any(h.get(kind, {}).get("host") for h in handlers(s) for kind in ("httpGet", "tcpSocket"))
    ),
    "AppArmor": lambda s: all(
        c.get("appArmorProfile", {}).get("type", "RuntimeDefault") in {"RuntimeDefault", "Localhost"}
        for c in contexts(s)
    ),
    "SELinux": lambda s: all(
        o.get("type") in SELINUX and not o.get("user") and not o.get("role")
        for o in (c.get("seLinuxOptions", {}) for c in contexts(s))
    ),
    "/proc Mount Type": lambda s: all(c.get("procMount", "Default") == "Default" for c in contexts(s)),
    "Sysctls": lambda s: all(e["name"] in SYSCTLS for c in contexts(s) for e in c.get("sysctls", ())),
    "Volume Types": lambda s: all(v.keys() - {"name"} <= VOLUMES for v in s.get("volumes", ())),
    "Privilege Escalation": lambda s: all(e is False for e in effective(s, "allowPrivilegeEscalation")),
    "Running as Non-root": lambda s: (
        all(effective(s, "runAsNonRoot")) and not any(c.get("runAsNonRoot") is False for c in contexts(s))
    ),
    "Running as Non-root user": lambda s: all(c.get("runAsUser") != 0 for c in contexts(s)),
    "Seccomp": lambda s: all(
        (p or {}).get("type") in {"RuntimeDefault", "Localhost"} for p in effective(s, "seccompProfile")
    ),
    "Capabilities": lambda s: all(
        "ALL" in (c or {}).get("drop", ()) and set((c or {}).get("add", ())) <= {"NET_BIND_SERVICE"}
        for c in effective(s, "capabilities")
    ),
}

# One change of the container, or of the whole pod, against each control.
POD, CONTAINER, CONTEXT = "pod", "container", "context"
VIOLATIONS: dict[str, tuple[str, Object]] = {
    "HostProcess": (CONTEXT, {"windowsOptions": {"hostProcess": True}}),
    "Host Namespaces": (POD, {"hostPID": True}),
    "Privileged Containers": (CONTEXT, {"privileged": True}),
    "HostPath Volumes": (POD, {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}),
    "Host Ports": (CONTAINER, {"ports": [{"containerPort": 1, "hostPort": 1}]}),
    "Host Probes / Lifecycle Hooks": (CONTAINER, {"livenessProbe": {"httpGet": {"port": 1, "host": "10.0.0.1"}}}),
    "AppArmor": (CONTEXT, {"appArmorProfile": {"type": "Unconfined"}}),
    "SELinux": (CONTEXT, {"seLinuxOptions": {"type": "spc_t"}}),
    "/proc Mount Type": (CONTEXT, {"procMount": "Unmasked"}),
    "Sysctls": (POD, {"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}),
    "Volume Types": (POD, {"volumes": [{"name": "v", "nfs": {"server": "s", "path": "/"}}]}),
    "Privilege Escalation": (CONTEXT, {"allowPrivilegeEscalation": True}),
    "Running as Non-root": (CONTEXT, {"runAsNonRoot": False}),
    "Running as Non-root user": (CONTEXT, {"runAsUser": 0}),
    "Seccomp": (CONTEXT, {"seccompProfile": {"type": "Unconfined"}}),
    "Capabilities": (CONTEXT, {"capabilities": {"drop": ["ALL"], "add": ["SYS_PTRACE"]}}),
}


def pods() -> dict[str, Callable[[], Object]]:
    def of_job(name: str) -> Object:
        spec: Object = one(render(KUBERNETES / name), "Job")["spec"]["template"]["spec"]
        return spec

    def of_kserve() -> Object:
        """KServe puts the runtime's containers unchanged into the predictor's pod."""
        objects = render(KUBERNETES / "kserve")
        predictor = one(objects, "InferenceService")["spec"]["predictor"]
        runtime = one(objects, "ClusterServingRuntime")["spec"]["containers"]
        return {**{k: v for k, v in predictor.items() if k != "model"}, "containers": runtime}

    return {
        **{name: lambda name=name: pod(overlay(name)) for name in OVERLAYS},
        **{name: lambda name=name: of_job(name) for name in ("export", "load")},
        **{name: lambda name=name: pod(component(name)) for name in ("tls", "no-tokens")},
        "tensorrt": lambda: pod(component("tensorrt", on="overlays/gpu")),
        "kserve": of_kserve,
    }


PODS = pods()


@pytest.mark.parametrize("name", PODS)
def test_every_pod_is_restricted(name: str) -> None:
    spec = PODS[name]()
    assert containers(spec)
    assert [control for control, meets in CONTROLS.items() if not meets(spec)] == []


@pytest.mark.parametrize("control", CONTROLS)
def test_a_pod_that_violates_a_control_is_found(control: str) -> None:
    spec = copy.deepcopy(PODS["cpu"]())
    where, change = VIOLATIONS[control]
    (only,) = spec["containers"]
    {POD: spec, CONTAINER: only, CONTEXT: only["securityContext"]}[where].update(change)
    assert not CONTROLS[control](spec)


@pytest.mark.parametrize("name", PODS)
def test_pods_have_no_identity_and_no_writable_root(name: str) -> None:
    spec = PODS[name]()
    assert spec["automountServiceAccountToken"] is False
    assert name == "kserve" or spec["enableServiceLinks"] is False
    for each in containers(spec):
        assert each["securityContext"]["readOnlyRootFilesystem"] is True
        assert each["resources"]["limits"].keys() >= {"cpu", "memory"}, "the server counts its cores by the limit"


def test_a_policy_covers_the_servers_and_the_export() -> None:
    """Nothing connects to the Job. It reaches names and public addresses: no pod, no node, no metadata service."""
    policy = one(render(KUBERNETES / "export"), "NetworkPolicy")["spec"]
    labels = one(render(KUBERNETES / "export"), "Job")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["ingress"] == []
    dns, https = policy["egress"]
    assert {port["port"] for port in dns["ports"]} == {53}
    assert [port["port"] for port in https["ports"]] == [443]
    for peer in https["to"]:
        block = peer["ipBlock"]
        whole, *private = map(ipaddress.ip_network, (block["cidr"], *block["except"]))
        for address in (
            "10.1.2.3",
            "100.64.0.1",
            "169.254.169.254",
            "172.20.0.1",
            "192.168.1.1",
            "fd00:ec2::254",
            "fe80::1",
        ):
            if (ip := ipaddress.ip_address(address)).version == whole.version:
                assert any(ip in network for network in private)


def test_servers_need_tokens_or_say_none() -> None:
    """Without the Secret, or with an empty one, no pod starts."""
    for name, tokens in (("cpu", True), ("gpu", True), ("dev", False)):
        (variable,) = (e for e in containers(PODS[name]())[0]["env"] if e["name"] == "RAFAGA_BEARER_TOKEN_SHA256")
        if tokens:
            assert variable["valueFrom"]["secretKeyRef"]["optional"] is False
        else:
            assert variable == {"name": "RAFAGA_BEARER_TOKEN_SHA256", "value": "none"}
    assert "--bearer-token-sha256=none" in containers(PODS["kserve"]())[0]["args"]
