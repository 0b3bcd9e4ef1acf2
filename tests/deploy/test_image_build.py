"""Builds and runs the images: debootstrap makes a base, buildah the rest, without a registry or a daemon.

Needs root and 20 GB of disk and takes minutes, so these tests are nightly; `make images` installs the tools and runs
them. `-k cpu` builds only the small one.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import psutil
import pytest

from rafaga.load import document
from rafaga.load.log import OK
from tests import bundles
from tests.deploy.rendering import ROOT, job
from tests.integration.serving import PATIENCE_S, free_port, serving
from tests.models.support import data_root

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]

PACKAGES = Path("opt/rafaga/lib/python3.11/site-packages")


class Buildah:
    """Images and containers in a separate folder."""

    def __init__(self, folder: Path) -> None:
        self._numbers = itertools.count()
        self._options = ["--root", str(folder / "storage"), "--runroot", str(folder / "run")]

    def __call__(self, *arguments: str) -> str:
        command = ["buildah", *self._options, *arguments]
        environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    @contextmanager
    def built(self, dockerfile: str, *arguments: str) -> Iterator[Path]:
        """The file system of a Dockerfile's image; removed afterwards, because it is large."""
        image = f"localhost/built-{next(self._numbers)}"
        bases = [f"--build-arg={name}_IMAGE=localhost/{name.lower()}" for name in ("BUILD", "BASE")]
        chosen = [*bases, *(f"--build-arg={argument}" for argument in arguments)]
        files = [f"--ignorefile={dockerfile}.dockerignore", f"--file={dockerfile}", f"--tag={image}", "."]
        # With the host's certificates, for networks with their own authorities.
        self("bud", "--network=host", "--volume=/etc/ssl/certs:/etc/ssl/certs:ro", *chosen, *files)
        container = self("from", image)
        try:
            yield Path(self("mount", container))
        finally:
            self("umount", container)
            self("rm", container)
            self("rmi", image)

    def commit(self, container: str, image: str) -> None:
        self("commit", "--quiet", container, image)
        self("rm", container)


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Buildah:
    """With a base image of Debian's Python, and a second one with pip."""
    missing = [tool for tool in ("buildah", "debootstrap", "unshare") if shutil.which(tool) is None]
    if missing or os.geteuid():
        pytest.skip(f"building images needs root and {', '.join(missing) or 'nothing else'}: `make images`")
    rootfs = ROOT / "build/rootfs"  # kept: it takes longest
    if not (rootfs / "usr/bin/python3").exists():
        shutil.rmtree(rootfs, ignore_errors=True)
        include = "--include=python3,ca-certificates"
        subprocess.run(["debootstrap", "--variant=minbase", include, "bookworm", str(rootfs)], check=True, stdout=2)
        shutil.rmtree(rootfs / "var/cache/apt/archives", ignore_errors=True)
    build = Buildah(tmp_path_factory.mktemp("buildah"))
    container = build("from", "scratch")
    build("copy", "--quiet", container, str(rootfs), "/")
    build("config", "--env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", container)
    build.commit(container, "localhost/base")
    container = build("from", "localhost/base")
    install = "apt-get update -qq && apt-get install -qq --no-install-recommends python3-pip >/dev/null"
    build("run", "--network", "host", container, "sh", "-c", install)
    build.commit(container, "localhost/build")
    return build


@pytest.fixture(scope="module")
def cpu(buildah: Buildah) -> Iterator[Path]:
    with buildah.built("deploy/docker/server.Dockerfile") as image:
        yield image


@pytest.fixture(scope="module")
def gpu(buildah: Buildah) -> Iterator[Path]:
    with buildah.built("deploy/docker/server.Dockerfile", "REQUIREMENTS=server-gpu") as image:
        yield image


@pytest.fixture(params=["cpu", "gpu"])
def server(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


def test_the_servers_image_has_no_compiler_and_no_torch(server: Path) -> None:
    print(f"{size(server)} in /opt/rafaga")
    assert (server / PACKAGES / "onnxruntime").is_dir()
    for absent in (PACKAGES / "torch", PACKAGES / "pip", Path("usr/bin/gcc")):
        assert not (server / absent).exists()
    if not (server / PACKAGES / "nvidia").exists():
        assert megabytes(server / "opt/rafaga") < 250


def test_the_image_for_gpus_contains_cuda(gpu: Path) -> None:
    """The libraries that ONNX Runtime's CUDA provider links to are installed as packages, except for the driver."""
    provider = gpu / PACKAGES / "onnxruntime/capi/libonnxruntime_providers_cuda.so"
    command = ["readelf", "--dynamic", str(provider)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(lib(?:cu|nv)[^]]+)\]", listed))
    assert "libcuda.so.1" in needed, "it is part of the node's driver"
    needed |= {"libcudnn.so.9", "libcufft.so.12"}  # loaded at first use
    there = {path.name for path in (gpu / PACKAGES / "nvidia").rglob("lib*.so*")}
    assert needed - {"libcuda.so.1"} <= there


def test_it_serves_without_root_on_a_read_only_file_system_and_stops_cleanly(server: Path, tmp_path: Path) -> None:
    """1. Started as the image's user, on a file system that is read-only, it gets ready. 2. SIGTERM ends it with 0."""
    bundles.publish_classifier(tmp_path / "models")
    (tmp_path / "models").chmod(0o755)
    serve_and_stop(server, tmp_path / "models", tmp_path / "log")


def test_the_server_serves_what_the_export_image_publishes(cpu: Path, tmp_path: Path, buildah: Buildah) -> None:
    """1. The Job's container exports, as its user, into the repository only. 2. The image for CPUs serves that."""
    models, scratch = tmp_path / "models", tmp_path / "scratch"
    for folder in (models, scratch):
        folder.mkdir()
        folder.chmod(0o777)
    mounted = {models: ("models", "rw"), scratch: ("scratch", "rw"), data_root("mnist"): ("data", "ro")}
    environment = "HOME=/scratch TMPDIR=/scratch RAFAGA_DATA=/data"
    command = "python3 -m export lenet5-mnist --output /models --precisions fp32"
    with buildah.built("deploy/docker/export.Dockerfile") as export, (tmp_path / "log").open("wb") as log:
        print(f"{size(export)} in /opt/rafaga")
        start = time.monotonic()
        assert inside(export, mounted, environment, command, log).wait(900) == 0, (tmp_path / "log").read_text()
        print(f"exported within {time.monotonic() - start:.1f} s of its start")
    assert (models / "lenet5-mnist/1/bundle.json").is_file()
    serve_and_stop(cpu, models, tmp_path / "serving.log")


def test_the_load_image_measures_a_server_as_the_job_does(buildah: Buildah, repository: Path, tmp_path: Path) -> None:
    """As its user, without a writable folder: its output is the result."""
    (only,) = job("load")["spec"]["containers"]
    with buildah.built("deploy/docker/load.Dockerfile") as load, serving(repository) as served:
        print(f"{size(load)} in /opt/rafaga")
        assert not (load / PACKAGES / "onnxruntime").exists()
        assert megabytes(load / "opt/rafaga") < 250
        (load / "etc/rafaga-client").mkdir()
        (load / "etc/rafaga-client/token").write_text("secret")
        changed = [f"--server={served.address}", "--model=digits", "--rate=20", "--duration=1"]
        kept = [word for word in only["args"] if word.split("=")[0] not in {c.split("=")[0] for c in changed}]
        with (tmp_path / "log").open("wb") as log:
            process = inside(load, {}, "", " ".join(["rafaga", *kept, *changed]), log)
            assert process.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()
    run = document.read(tmp_path / "log")
    assert set(run.steps[0].tally.outcomes) == {OK}
    assert len(run.steps[0].generators) == 2


def serve_and_stop(image: Path, models: Path, log_path: Path) -> None:
    grpc_port, http_port = free_port(), free_port()
    start = time.monotonic()
    with log_path.open("wb") as log:
        command = f"rafaga serve --repository=/models --grpc-port={grpc_port} --http-port={http_port}"
        process = inside(image, {models: ("models", "ro")}, "", command, log)
    try:
        while not ready(http_port):
            assert process.poll() is None, log_path.read_text()
            assert time.monotonic() - start < PATIENCE_S
            time.sleep(0.05)
        memory = psutil.Process(process.pid).memory_info().rss >> 20
        print(f"ready after {time.monotonic() - start:.1f} s, {memory} MiB")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait(PATIENCE_S)
    assert all(line.startswith("{") for line in log_path.read_text().splitlines()), "only the server's own log"


def inside(
    image: Path, mounted: dict[Path, tuple[str, str]], environment: str, command: str, log: BinaryIO
) -> subprocess.Popen[bytes]:
    """`command` in the image as Kubernetes runs it: as its user, and only what is mounted "rw" is writable."""
    mounts = [f"mount --bind {image} {image}"]
    for source, (target, mode) in mounted.items():
        (image / target).mkdir(exist_ok=True)  # as Kubernetes does for a volume
        mounts += [f"mount --bind {source} {image}/{target}", f"mount -o remount,bind,{mode} {image}/{target}"]
    folder = "/app" if (image / "app").is_dir() else "/"
    mounts += [
        f"mount -t proc proc {image}/proc",
        f"mount --bind /dev {image}/dev",
        f"mount -o remount,bind,ro {image}",
        f"exec chroot --userspec=65532:65532 {image} /usr/bin/env -i -C {folder} ORT_DISABLE_TELEMETRY=1"
        f" PYTHONDONTWRITEBYTECODE=1 PATH=/opt/rafaga/bin:/usr/bin:/bin {environment} {command}",
    ]
    return subprocess.Popen(["unshare", "--mount", "sh", "-ec", "\n".join(mounts)], stdout=log, stderr=log)


def megabytes(folder: Path) -> float:
    return sum(f.lstat().st_size for f in folder.rglob("*") if not f.is_symlink()) / 2**20


def size(image: Path) -> str:
    """The total, and what the Dockerfile adds."""
    return f"{megabytes(image):.0f} MiB, of these {megabytes(image / 'opt/rafaga'):.0f} MiB"


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
