"""docs/operating.md: every command in it is run, or checked against what it names where it needs a cluster."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable

import pytest
import yaml

from deploy.monitoring.signals import Alert, Pace, Severity, alerts
from rafaga.server.config import Config, add_arguments, from_arguments
from tests.deploy.rendering import ROOT, Object, one, overlay, render
from tests.integration.serving import Served

GUIDE = (ROOT / "docs/operating.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


def kubectl(words: list[str]) -> None:
    """What it applies renders; what it names is in the manifests."""
    verb = words[1]
    assert verb in {"apply", "create", "delete", "get", "label", "rollout", "wait"}
    if "-k" in words:
        assert render(ROOT / words[words.index("-k") + 1])
    known = {f"{o['kind'].lower()}/{o['metadata']['name']}" for name in ("cpu", "dev") for o in overlay(name)}
    assert {word for word in words if re.fullmatch(r"[a-z]+/[a-z-]+", word)} <= known
    if words[1:4] == ["create", "secret", "generic"]:
        reference = next(e for e in _environment() if "valueFrom" in e)["valueFrom"]["secretKeyRef"]
        assert words[4] == reference["name"]
        assert any(word.startswith(f"--from-literal={reference['key']}=") for word in words)


def _environment() -> list[Object]:
    env: list[Object] = one(overlay("cpu"), "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]
    return env


def rafaga(words: list[str]) -> None:
    """The server takes these settings."""
    assert words[1] == "serve"
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = [str(ROOT / w) if (ROOT / w).is_file() else w for w in words[2:]]
    from_arguments(parser.parse_args(arguments), {})


def docker(words: list[str]) -> None:
    """The Dockerfile is there and has the arguments."""
    assert words[1] == "build"
    dockerfile = (ROOT / words[words.index("-f") + 1]).read_text()
    for i, word in enumerate(words):
        if word == "--build-arg":
            assert re.search(rf"^ARG {words[i + 1].split('=')[0]}=", dockerfile, flags=re.MULTILINE)


def promtool(words: list[str]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool (Debian: prometheus) is not installed")
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True, timeout=60)


def helm(words: list[str]) -> None:
    """Needs a cluster and a chart; the values are checked in test_monitoring."""
    assert yaml.safe_load((ROOT / words[words.index("--values") + 1]).read_text())


def ignored(words: list[str]) -> None:
    """Has a test of its own below."""


def nginx(words: list[str]) -> None:
    """Which files, is the machine's business; ours is tested in tests/process."""
    assert words[1:] in (["-t"], ["-s", "reload"])


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "kubectl": kubectl,
    "rafaga": rafaga,
    "docker": docker,
    "promtool": promtool,
    "helm": helm,
    "nginx": nginx,
    "curl": ignored,
    "TOKEN": ignored,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    words = shlex.split(command)
    CHECKS[re.split(r"[\s=]", command)[0]](words)


def test_the_hash_of_a_token_is_what_the_server_takes() -> None:
    (block,) = (b for b in blocks("sh") if b.startswith("TOKEN="))
    token, secret, _ = block.splitlines()
    expression = re.search(r'sha256=("\$\(.*\)")', secret)
    assert expression
    script = f"{token}\nprintf %s {expression[1]}"
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    digest = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout
    assert Config(bearer_token_sha256=(digest,)).bearer_token_sha256 == (digest,)


def test_curl_asks_for_what_the_server_answers(server: Served) -> None:
    (url,) = (word for c in COMMANDS if c.startswith("curl") for word in shlex.split(c) if word.startswith("http"))
    base = f"http://127.0.0.1:{Config().http_port}"
    assert url.startswith(base)
    assert server.get(url.removeprefix(base))[0] == 200


def test_an_overlay_of_ones_own_renders() -> None:
    (example,) = blocks("yaml")
    place = ROOT / "build/own/overlay"  # two folders below the checkout, as the example has it
    place.mkdir(parents=True, exist_ok=True)
    (place / "kustomization.yaml").write_text(example.replace("../../deploy", "../../../deploy"))
    deployment = one(render(place), "Deployment")
    assert deployment["metadata"]["namespace"] == "rafaga"
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    assert only["image"].startswith("registry.example.com/rafaga-server:")


@pytest.mark.parametrize("alert", alerts(Pace()), ids=lambda alert: alert.name)
def test_every_alert_has_a_section_that_says_how_urgent_it_is(alert: Alert) -> None:
    section = re.search(rf"^### {alert.name}\n\n\*(page|ticket)\.\*", GUIDE, flags=re.MULTILINE)
    assert section
    assert Severity(section[1]) is alert.severity


def test_links_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", GUIDE, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / "docs" / path).is_file()
        assert not anchor or anchor in anchors


@pytest.mark.parametrize("number", ["drain_delay_s", "drain_timeout_s"])
def test_times_told_are_those_of_the_manifests(number: str) -> None:
    value = tomllib.loads(next(iter(one(overlay("cpu"), "ConfigMap")["data"].values())))[number]
    assert re.search(rf"`{number}` \({value} s\)", GUIDE)
    grace = one(overlay("cpu"), "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert f"`terminationGracePeriodSeconds` ({grace})" in GUIDE
