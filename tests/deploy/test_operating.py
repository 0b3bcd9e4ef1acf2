"""The guides for operators: every command is run or, if it needs a cluster, checked against the files it names."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from deploy.monitoring.signals import Pace, alerts
from rafaga.cli import main
from rafaga.server.config.settings import Config
from tests.deploy.commands import check
from tests.deploy.rendering import ROOT, container, job, one, overlay, pod, render
from tests.documents import blocks, commands
from tests.integration.serving import Served

GUIDE = (ROOT / "docs/operating.md").read_text()

COMMANDS = [*commands("docs/operating.md"), *commands("docs/security.md")]


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(("curl", "TOKEN="))])
def test_command(command: str) -> None:
    check(command)


def test_the_server_accepts_the_hash_of_the_token() -> None:
    (block,) = (b for b in blocks("docs/security.md", "sh") if b.text.startswith("TOKEN="))
    token, secret, client = block.lines
    assert {token, secret, client} <= set(commands("docs/operating.md"))
    expression = re.search(r'sha256=("\$\(.*\)")', secret)
    assert expression
    script = f"{token}\nprintf %s {expression[1]}"
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    digest = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout
    assert Config.of(bearer_token_sha256=(digest,)).security.bearer_token_sha256 == (digest,)


def test_curl_uses_a_path_of_the_server(server: Served) -> None:
    (url,) = (word for c in COMMANDS if c.startswith("curl") for word in shlex.split(c) if word.startswith("http"))
    base = f"http://127.0.0.1:{Config().network.http_port}"
    assert url.startswith(base)
    assert server.get(url.removeprefix(base))[0] == 200


def test_your_own_overlay_renders() -> None:
    (example,) = blocks("docs/operating.md", "yaml")
    place = ROOT / "build/own/overlay"  # two folders below the checkout, as the example has it
    place.mkdir(parents=True, exist_ok=True)
    (place / "kustomization.yaml").write_text(example.text.replace("../../deploy", "../../../deploy"))
    assert one(render(place), "Deployment")["metadata"]["namespace"] == "rafaga"
    assert container(render(place))["image"].startswith("registry.example.com/rafaga-server:")


def test_the_log_of_the_load_job_can_be_merged_and_drawn(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1. The Job's command, shortened and against this server. 2. The guide's command on its output."""
    monkeypatch.chdir(tmp_path)
    (only,) = job("load")["spec"]["containers"]
    (tmp_path / "token").write_text("secret")
    changed = ["--token-file=token", f"--server={server.address}", "--model=digits", "--duration=0.5", "--processes=1"]
    replaced = tuple(word.split("=")[0] + "=" for word in changed)
    kept = [word for word in only["args"] if not word.startswith(replaced)]
    assert main([*kept, "--warm-up=0.1", *changed]) == 0
    (tmp_path / "result.json").write_text(capsys.readouterr().out)
    (judge,) = (shlex.split(c) for c in COMMANDS if c.startswith("rafaga load merge"))
    assert main([*judge[1:], "--slo-p99-ms=60000"]) == 0  # the last of two equal options counts
    assert "<svg" in (tmp_path / judge[judge.index("--report") + 1]).read_text()


def test_every_alert_has_a_section_with_its_severity() -> None:
    found = dict(re.findall(r"^### (\w+)\n\n\*(page|ticket)\.\*", GUIDE, flags=re.MULTILINE))
    assert found == {alert.name: alert.severity for alert in alerts(Pace())}


def test_times_are_those_of_the_manifests() -> None:
    settings = tomllib.loads(next(iter(one(overlay("cpu"), "ConfigMap")["data"].values())))
    for name in ("drain_delay_s", "drain_timeout_s"):
        assert re.search(rf"`{name}` \({settings[name]} s\)", GUIDE)
    assert f"`terminationGracePeriodSeconds` ({pod(overlay('cpu'))['terminationGracePeriodSeconds']})" in GUIDE
