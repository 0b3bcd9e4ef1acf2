"""Checks of commands in the documents that cannot run in a test, because they need a cluster, a daemon or a chart."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from rafaga.load.options import parse_merge
from rafaga.server.config.sources import add_arguments, from_arguments
from tests.deploy.rendering import KUBERNETES, ROOT, container, job, overlay, render

Check = Callable[[list[str], Path], None]
"""Takes the words of a command and its working directory."""


def check(command: str, folder: Path = ROOT) -> None:
    """Fails the test if the command is invalid."""
    words = shlex.split(command)
    CHECKS[words[0]](words, folder)


def kubectl(words: list[str], folder: Path) -> None:
    """Applied folders render, and named objects are in the manifests."""
    verb = words[1]
    assert verb in {"apply", "create", "delete", "get", "label", "logs", "rollout", "wait"}
    if "-k" in words:
        assert render(folder / words[words.index("-k") + 1])
    objects = (*overlay("cpu"), *overlay("dev"), *render(KUBERNETES / "load"))
    known = {f"{o['kind'].lower()}/{o['metadata']['name']}" for o in objects}
    assert {word for word in words if re.fullmatch(r"[a-z]+/[a-z-]+", word)} <= known | {"deploy/kubernetes"}
    if words[1:4] == ["create", "secret", "generic"]:
        assert words[4] in _secrets()
        assert any(word.startswith(f"--from-literal={_secrets()[words[4]]}=") for word in words)


def _secrets() -> dict[str, str]:
    """The Secrets that pods need, and the key in each."""
    (hashes,) = (e["valueFrom"]["secretKeyRef"] for e in container(overlay("cpu"))["env"] if "valueFrom" in e)
    spec = job("load")["spec"]
    (token,) = (a.rpartition("/")[2] for a in spec["containers"][0]["args"] if a.startswith("--token-file="))
    return {hashes["name"]: hashes["key"], spec["volumes"][0]["secret"]["secretName"]: token}


def rafaga(words: list[str], folder: Path) -> None:
    """The server accepts the settings; `load merge` accepts the options (test_operating runs it)."""
    if words[1:3] == ["load", "merge"]:
        parse_merge(words[3:])
        return
    assert words[1] in ("serve", "demo")
    parser = argparse.ArgumentParser()
    parser.add_argument("path", nargs="?")
    add_arguments(parser)
    arguments = [str(folder / w) if (folder / w).is_file() else w for w in words[2:]]
    from_arguments(parser.parse_args(arguments), {})


def docker(words: list[str], folder: Path) -> None:
    """The Dockerfile, its arguments and the files that it copies exist."""
    assert words[1] == "build"
    text = (folder / (words[words.index("-f") + 1] if "-f" in words else "Dockerfile")).read_text()
    for i, word in enumerate(words):
        if word == "--build-arg":
            assert re.search(rf"^ARG {words[i + 1].split('=')[0]}=", text, flags=re.MULTILINE)
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, flags=re.MULTILINE):
        assert all((folder / source).exists() for source in sources.split())


def promtool(words: Sequence[str | Path], folder: Path = ROOT) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool (Debian: prometheus) is not installed")
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def helm(words: list[str], folder: Path) -> None:
    """The values file is valid YAML; test_monitoring checks its contents."""
    assert yaml.safe_load((folder / words[words.index("--values") + 1]).read_text())


def nginx(words: list[str], _: Path) -> None:
    """tests/process runs nginx with the project's configuration."""
    assert words[1:] in (["-t"], ["-s", "reload"])


CHECKS: Mapping[str, Check] = {
    "kubectl": kubectl,
    "rafaga": rafaga,
    "docker": docker,
    "promtool": promtool,
    "helm": helm,
    "nginx": nginx,
}
