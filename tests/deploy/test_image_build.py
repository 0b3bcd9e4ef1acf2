"""The server's image, built for real: debootstrap makes a base, buildah the rest; no registry of images, no daemon.

Takes minutes and root, so it is a nightly test.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import bundles
from tests.deploy.prometheus import free_port
from tests.deploy.rendering import ROOT
from tests.integration.serving import PATIENCE_S

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]

PACKAGES = Path("opt/rafaga/lib/python3.11/site-packages")


class Buildah:
    """Images and containers in a folder of their own."""

    def __init__(self, folder: Path) -> None:
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
        pytest.skip(f"building images needs root and {', '.join(missing) or 'nothing else'}")
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
def image(buildah: Buildah) -> Iterator[Path]:
    """The file system of the built image."""
    buildah(
        "bud",
        "--network=host",
        *CERTIFICATES,
        "--ignorefile=deploy/docker/server.Dockerfile.dockerignore",
        "--build-arg=BUILD_IMAGE=localhost/build",
        "--build-arg=BASE_IMAGE=localhost/base",
        "--file=deploy/docker/server.Dockerfile",
        "--tag=localhost/rafaga-server",
        ".",
    )
    container = buildah("from", "localhost/rafaga-server")
    yield Path(buildah("mount", container))
    buildah("umount", container)


def test_it_is_small_and_holds_no_compiler_and_no_torch(image: Path) -> None:
    megabytes = sum(f.lstat().st_size for f in (image / "opt/rafaga").rglob("*") if not f.is_symlink()) / 2**20
    print(f"/opt/rafaga: {megabytes:.0f} MiB")
    assert megabytes < 250
    assert (image / PACKAGES / "onnxruntime").is_dir()
    for absent in (PACKAGES / "torch", PACKAGES / "pip", Path("usr/bin/gcc")):
        assert not (image / absent).exists()


def test_it_serves_without_root_on_a_read_only_file_system_and_stops_cleanly(image: Path, tmp_path: Path) -> None:
    """1. Started as the image's user, on a file system that is read-only, it gets ready. 2. SIGTERM ends it with 0."""
    bundles.publish_classifier(tmp_path / "models")
    (tmp_path / "models").chmod(0o755)
    (image / "models").mkdir(exist_ok=True)  # what Kubernetes makes for the volume
    grpc_port, http_port = free_port(), free_port()
    mounts = [
        f"mount --bind {image} {image}",
        f"mount --bind {tmp_path / 'models'} {image}/models",
        f"mount -o remount,bind,ro {image}/models",
        f"mount -t proc proc {image}/proc",
        f"mount --bind /dev {image}/dev",
        f"mount -o remount,bind,ro {image}",
        f"exec chroot --userspec=65532:65532 {image} /usr/bin/env -i ORT_DISABLE_TELEMETRY=1"
        " PATH=/opt/rafaga/bin:/usr/bin:/bin rafaga serve --repository=/models"
        f" --grpc-port={grpc_port} --http-port={http_port}",
    ]
    start = time.monotonic()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(["unshare", "--mount", "sh", "-ec", "\n".join(mounts)], stderr=log)
    try:
        while not ready(http_port):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() - start < PATIENCE_S
            time.sleep(0.05)
        print(f"ready after {time.monotonic() - start:.1f} s")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait(PATIENCE_S)
    log_lines = (tmp_path / "log").read_text().splitlines()
    assert all(line.startswith("{") for line in log_lines), "nothing but the server's own log"


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
