"""The images, built for real: debootstrap makes a base, buildah the rest; no registry of images, no daemon.

Takes minutes, root and 20 GB of disk, so these are nightly tests; `make images` installs what they need and runs them.
`-k cpu` builds the small one alone.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
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
from tests.deploy.prometheus import free_port
from tests.deploy.rendering import KUBERNETES, ROOT, one, render
from tests.deploy.test_images import CONSTRAINTS
from tests.integration.serving import PATIENCE_S, serving

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]

SERVER = "deploy/docker/server.Dockerfile"
PACKAGES = Path("opt/rafaga/lib/python3.11/site-packages")


class Buildah:
    """Images and containers in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._numbers = itertools.count()
        self._options = ["--root", str(folder / "storage"), "--runroot", str(folder / "run")]

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            ["buildah", *self._options, *arguments],
            cwd=ROOT,
            env={**os.environ, "BUILDAH_ISOLATION": "chroot"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    @contextmanager
    def built(self, dockerfile: str, *arguments: str) -> Iterator[Path]:
        """The file system of the image that a Dockerfile makes; removed afterwards, for it is large."""
        image = f"localhost/built-{next(self._numbers)}"
        self(
            "bud",
            "--network=host",
            *CERTIFICATES,
            f"--ignorefile={dockerfile}.dockerignore",
            "--build-arg=BUILD_IMAGE=localhost/build",
            "--build-arg=BASE_IMAGE=localhost/base",
            *(f"--build-arg={argument}" for argument in arguments),
            f"--file={dockerfile}",
            f"--tag={image}",
            ".",
        )
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


# The host's authorities, for networks that have their own.
CERTIFICATES = ("--volume", "/etc/ssl/certs:/etc/ssl/certs:ro")


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Buildah:
    """With a base image of Debian's Python, and one with pip beside it."""
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
    with buildah.built(SERVER) as image:
        yield image


@pytest.fixture(scope="module")
def gpu(buildah: Buildah) -> Iterator[Path]:
    """As the guide builds it."""
    with buildah.built(SERVER, f"ONNXRUNTIME=onnxruntime-gpu[cuda,cudnn]=={CONSTRAINTS['onnxruntime-gpu']}") as image:
        yield image


@pytest.fixture(scope="module")
def export(buildah: Buildah) -> Iterator[Path]:
    with buildah.built("deploy/docker/export.Dockerfile") as image:
        yield image


@pytest.fixture(scope="module")
def load(buildah: Buildah) -> Iterator[Path]:
    with buildah.built("deploy/docker/load.Dockerfile") as image:
        yield image


@pytest.fixture(params=["cpu", "gpu"])
def server(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


def test_the_servers_image_holds_no_compiler_and_no_torch(server: Path) -> None:
    print(f"{size(server)} in /opt/rafaga")
    assert (server / PACKAGES / "onnxruntime").is_dir()
    for absent in (PACKAGES / "torch", PACKAGES / "pip", Path("usr/bin/gcc")):
        assert not (server / absent).exists()


def test_the_image_for_cpus_is_small(cpu: Path) -> None:
    assert megabytes(cpu / "opt/rafaga") < 250
    assert not (cpu / PACKAGES / "nvidia").exists()


def test_the_image_for_gpus_needs_nothing_of_its_base(gpu: Path) -> None:
    """CUDA's libraries come as packages: what ONNX Runtime's CUDA provider links to is there, but for the driver."""
    provider = gpu / PACKAGES / "onnxruntime/capi/libonnxruntime_providers_cuda.so"
    command = ["readelf", "--dynamic", str(provider)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(lib(?:cu|nv)[^]]+)\]", listed))
    assert "libcuda.so.1" in needed, "the node's driver"
    needed |= {"libcudnn.so.9", "libcufft.so.12"}  # opened when they are first used
    there = {path.name for path in (gpu / PACKAGES / "nvidia").rglob("lib*.so*")}
    assert needed - {"libcuda.so.1"} <= there


def test_it_serves_without_root_on_a_read_only_file_system_and_stops_cleanly(server: Path, tmp_path: Path) -> None:
    """1. Started as the image's user, on a file system that is read-only, it gets ready. 2. SIGTERM ends it with 0."""
    bundles.publish_classifier(tmp_path / "models")
    (tmp_path / "models").chmod(0o755)
    serve_and_stop(server, tmp_path / "models", tmp_path / "log")


def test_what_the_export_image_publishes_the_servers_image_serves(
    export: Path, tmp_path: Path, buildah: Buildah
) -> None:
    """1. The Job's container exports, as its user, into the repository alone. 2. The image for CPUs serves that."""
    data = Path(os.environ.get("RAFAGA_DATA", ROOT / "../shared/data"))
    if not (data / "mnist").is_dir():
        pytest.skip(f"no data in {data}: set RAFAGA_DATA")
    print(f"{size(export)} in /opt/rafaga")
    models, scratch = tmp_path / "models", tmp_path / "scratch"
    for folder in (models, scratch):
        folder.mkdir()
        folder.chmod(0o777)
    start = time.monotonic()
    with (tmp_path / "log").open("wb") as log:
        process = inside(
            export,
            {models: ("models", "rw"), scratch: ("scratch", "rw"), data: ("data", "ro")},
            "HOME=/scratch TMPDIR=/scratch RAFAGA_DATA=/data",
            "python3 -m export lenet5-mnist --output /models --precisions fp32",
            log,
        )
        assert process.wait(900) == 0, (tmp_path / "log").read_text()
    print(f"exported within {time.monotonic() - start:.1f} s of its start")
    assert (models / "lenet5-mnist/1/bundle.json").is_file()
    with buildah.built(SERVER) as server:
        serve_and_stop(server, models, tmp_path / "serving.log")


def test_the_load_image_measures_a_server_as_the_job_does(load: Path, repository: Path, tmp_path: Path) -> None:
    """Its user, nothing writable at all: its output is a result that can be judged and reported anywhere."""
    print(f"{size(load)} in /opt/rafaga")
    assert not (load / PACKAGES / "onnxruntime").exists()
    assert megabytes(load / "opt/rafaga") < 250
    (only,) = one(render(KUBERNETES / "load"), "Job")["spec"]["template"]["spec"]["containers"]
    with serving(repository) as served:
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
        process = inside(
            image,
            {models: ("models", "ro")},
            "",
            f"rafaga serve --repository=/models --grpc-port={grpc_port} --http-port={http_port}",
            log,
        )
    try:
        while not ready(http_port):
            assert process.poll() is None, log_path.read_text()
            assert time.monotonic() - start < PATIENCE_S
            time.sleep(0.05)
        print(
            f"ready after {time.monotonic() - start:.1f} s, {psutil.Process(process.pid).memory_info().rss >> 20} MiB"
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait(PATIENCE_S)
    assert all(line.startswith("{") for line in log_path.read_text().splitlines()), "nothing but the server's own log"


def inside(
    image: Path, mounted: dict[Path, tuple[str, str]], environment: str, command: str, log: BinaryIO
) -> subprocess.Popen[bytes]:
    """`command` in the image as Kubernetes would run it: its user, nothing writable but what is mounted "rw"."""
    mounts = [f"mount --bind {image} {image}"]
    for source, (target, mode) in mounted.items():
        (image / target).mkdir(exist_ok=True)  # what Kubernetes makes for a volume
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
    """Of what the Dockerfile adds, and of all."""
    return f"{megabytes(image):.0f} MiB, of these {megabytes(image / 'opt/rafaga'):.0f} MiB"


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
