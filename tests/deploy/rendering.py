"""The rendered manifests."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from rafaga.server.config.settings import Config
from rafaga.server.config.sources import add_arguments, from_arguments
from rafaga.server.execution.served_model import ServedModel

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = ("dev", "cpu", "gpu")

Object = dict[str, Any]


@cache
def kustomize() -> tuple[str, ...]:
    """The command that renders. Skips the test if there is none."""
    if path := shutil.which("kustomize"):
        return (path, "build")
    if path := shutil.which("kubectl"):
        return (path, "kustomize")
    pytest.skip("neither kubectl (Debian: kubernetes-client) nor kustomize is installed")


@cache
def render(folder: Path) -> tuple[Object, ...]:
    done = subprocess.run([*kustomize(), str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def overlay(name: str) -> tuple[Object, ...]:
    return render(KUBERNETES / "overlays" / name)


@cache
def component(name: str, on: str = "base") -> tuple[Object, ...]:
    """The base, or an overlay, with one component."""
    build = ROOT / "build"  # inside the checkout, because kustomize takes relative paths only
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as folder:
        kustomization = Path(folder) / "kustomization.yaml"
        base, chosen = (f"../../deploy/kubernetes/{part}" for part in (on, f"components/{name}"))
        kustomization.write_text(f"resources: [{base}]\ncomponents: [{chosen}]\n")
        return render(kustomization.parent)


def one(objects: tuple[Object, ...], kind: str, name: str | None = None) -> Object:
    (found,) = (o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"]))
    return found


def pod(objects: tuple[Object, ...]) -> Object:
    """The spec of the server's pods."""
    spec: Object = one(objects, "Deployment")["spec"]["template"]["spec"]
    return spec


def container(objects: tuple[Object, ...]) -> Object:
    (only,) = pod(objects)["containers"]
    return dict(only)


def job(name: str) -> Object:
    """The template of the pods of `export` or `load`."""
    template: Object = one(render(KUBERNETES / name), "Job")["spec"]["template"]
    return template


def stop_engines_s() -> float:
    """How long the server waits for its engines to stop."""
    (timeout_s,) = ServedModel.close.__defaults__ or ()
    return float(timeout_s)


def settings(container: Object, config_map: Object | None, folder: Path) -> Config:
    """The server's settings from a container's arguments, environment and mounted file, written to `folder`."""
    command, *arguments = container["args"]
    assert command == "serve"
    if config_map is not None:
        ((name, text),) = config_map["data"].items()
        (folder / name).write_text(text)
        mounted = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "config")
        arguments = [a.replace(f"{mounted}/{name}", str(folder / name)) for a in arguments]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    # Values of Secrets are hashes.
    environment = {e["name"]: e.get("value", "0" * 64) for e in container.get("env", ())}
    return from_arguments(parser.parse_args(arguments), environment)
