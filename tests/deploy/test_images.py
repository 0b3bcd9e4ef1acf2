"""Dockerfiles, checked without building them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from typing import NamedTuple

import pytest

from rafaga.server.config.settings import Config
from tests.deploy.rendering import ROOT, container, job, overlay, pod

DOCKER = ROOT / "deploy/docker"
NAMES = ("server", "export", "load")
CONSTRAINTS = {
    re.sub("[-_.]+", "-", name).lower(): version
    for name, version in re.findall(r"(?m)^(\S+)==(\S+)$", (ROOT / "requirements/constraints.txt").read_text())
}
ORT = CONSTRAINTS["onnxruntime-gpu"]
# By file of requirements/images: the arguments of requirements.py, as `make hashes` gives them.
LOCKED = {
    "server": ("server", "tracing", "gpu", "openvino", "--replace", f"onnxruntime=onnxruntime=={ORT}"),
    "server-gpu": ("server", "tracing", "gpu", "--replace", f"onnxruntime=onnxruntime-gpu[cuda,cudnn]=={ORT}"),
    "export": ("export", "openvino", "--replace", f"onnxruntime=onnxruntime=={ORT}"),
    "load": ("load",),
}


class Instruction(NamedTuple):
    word: str
    rest: str


def stages(name: str) -> list[list[Instruction]]:
    """The instructions before the first FROM, and of each stage."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / f"{name}.Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found: list[list[Instruction]] = [[]]
    for line in filter(None, lines):
        instruction = Instruction(*line.split(maxsplit=1))
        if instruction.word == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found


def last(name: str, word: str) -> str:
    """What the final image's last `word` says."""
    return [i.rest for i in stages(name)[-1] if i.word == word][-1]


@pytest.mark.parametrize("name", NAMES)
def test_the_image_is_built_in_stages_and_is_not_root(name: str) -> None:
    """Base images can be named by digest; packages are copied from the build stage."""
    defaults, *built = stages(name)
    arguments = {i.rest.split("=")[0] for i in defaults if i.word == "ARG"}
    assert {stage[0].rest.split()[0] for stage in built} <= {f"${{{argument}}}" for argument in arguments}
    assert len(built) == 2
    assert not any(i.word == "RUN" and "pip" in i.rest for i in built[-1])
    spec = pod(overlay("cpu")) if name == "server" else job(name)["spec"]
    assert last(name, "USER") == "{runAsUser}:{runAsGroup}".format(**spec["securityContext"])
    assert spec["securityContext"]["runAsUser"] > 0


def test_images_start_and_mount_what_the_manifests_do() -> None:
    for name, only in (("server", container(overlay("cpu"))), ("load", job("load")["spec"]["containers"][0])):
        assert last(name, "ENTRYPOINT") == '["rafaga"]'
        assert only["args"][0] in last(name, "CMD")
    network = Config().network
    assert {int(port) for port in last("server", "EXPOSE").split()} == {network.grpc_port, network.http_port}
    (only,) = job("export")["spec"]["containers"]
    variables = dict(pair.split("=", 1) for pair in last("export", "ENV").split())
    assert {variables["HOME"], variables["TMPDIR"]} <= {m["mountPath"] for m in only["volumeMounts"]}


@pytest.mark.parametrize("name", NAMES)
def test_copied_files_exist_and_are_not_ignored(name: str) -> None:
    ignored = (DOCKER / f"{name}.Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source
        for stage in stages(name)[1:]
        for i in stage
        if i.word == "COPY" and not i.rest.startswith("--from")
        for source in i.rest.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def needed(*arguments: str) -> list[str]:
    command = [sys.executable, str(DOCKER / "requirements.py"), *arguments, "--project", str(ROOT / "pyproject.toml")]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0] for requirement in requirements}


def test_images_have_the_packages_of_their_extras_and_no_others() -> None:
    """No torch in the server's, no engine in the load tester's, no build for GPUs unless asked."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    cpu = needed("server", "tracing", "--replace", "onnxruntime=onnxruntime==1")
    assert not names(cpu) & {"torch", "torchvision", "onnx", "onnxruntime-gpu", "matplotlib"}
    assert "onnxruntime==1" in cpu
    wanted = names(extras["server"]) - {"onnxruntime-gpu"}
    assert wanted <= names(cpu)
    gpu = needed("server", "--replace", "onnxruntime=onnxruntime-gpu[cuda,cudnn]==1")
    assert {name for name in names(gpu) if "onnxruntime" in name} == {"onnxruntime-gpu"}
    nested = needed("export", "--replace", "onnxruntime=onnxruntime==1")
    assert wanted | names(extras["export"]) - {"rafaga"} <= names(nested)
    assert not names(needed("load")) & {"torch", "onnxruntime", "onnxruntime-gpu", "mlcommons-loadgen"}


def locked(name: str) -> dict[str, str]:
    """Versions by package. Fails on a line that is not a version with its hashes, such as the address of an index."""
    found = {}
    for line in (ROOT / f"requirements/images/{name}.txt").read_text().splitlines():
        entry = re.fullmatch(r"(\S+)==(\S+)(?: --hash=sha256:[0-9a-f]{64})+", line)
        assert entry, line
        found[entry[1]] = entry[2]
    return found


@pytest.mark.parametrize("name", LOCKED)
def test_locked_packages_are_complete_and_those_of_the_constraints(name: str) -> None:
    """Otherwise `make hashes` was not run after a change of pyproject.toml or the constraints."""
    versions = locked(name)
    assert names(needed(*LOCKED[name])) <= versions.keys()
    assert versions == {each: CONSTRAINTS["onnxruntime-gpu" if each == "onnxruntime" else each] for each in versions}


def planned(*arguments: str) -> str:
    """What make would run."""
    command = ["make", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_each_image_takes_only_what_is_locked() -> None:
    assert locked("build").keys() >= {"hatchling"}
    plan = planned("--always-make", "hashes")
    assert all(f"requirements.py {shlex.join(arguments)} " in plan for arguments in LOCKED.values())
    # Beyond that, the package itself and what the builder names.
    others = ("--no-build-isolation .", "${TORCH}", '"${TENSORRT}"')
    for name in NAMES:
        scripts = [i.rest for stage in stages(name) for i in stage if i.word == "RUN"]
        for command in (each.strip() for script in scripts for each in re.split("&&|;", script)):
            assert " install " not in command or "--require-hashes" in command or command.endswith(others)


def test_every_image_is_listed_and_audited() -> None:
    plan = planned("sbom", "audit").replace(";", "\n").splitlines()
    for name in LOCKED:
        listed, audited = (line for line in plan if f"images/{name}.txt" in line)
        assert "cyclonedx-py" in listed
        assert "pip-audit --strict" in audited
