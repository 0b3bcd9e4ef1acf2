"""What the documentation starts: `rafaga serve` in each of their ways, and nginx in front."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests import bundles
from tests.documents import ROOT, commands
from tests.integration.serving import PATIENCE_S
from tests.process.nginx import nginx
from tests.process.running import Process

PAGES = ("README.md", "docs/operating.md", "docs/security.md")
SERVERS = [command for page in PAGES for command in commands(page) if command.startswith("rafaga serve ")]
assert len(SERVERS) >= 3, "they are found"
# The last of two equal options counts: free ports, and no waiting for balancers that are not there.
QUICK = ["--grpc-port", "0", "--http-port", "0", "--drain-delay-s", "0"]


def certificate(folder: Path, name: str, *signed: str) -> None:
    """name.key and name.crt, signed by themselves unless told otherwise."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command, which makes the certificates, is not installed")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]
    subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", *key, "-out", f"{name}.crt", "-days", "2", *subject, *signed]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("command", SERVERS)
def test_it_serves_and_stops(command: str, tmp_path: Path) -> None:
    """In a folder that has what the command names; asked the way that its settings ask for."""
    shutil.copy(bundles.publish_classifier(tmp_path / "repository") / "model.onnx", tmp_path)
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    words = shlex.split(command, comments=True)[2:]
    credentials = None
    if "--tls-key" in words:
        certificate(tmp_path, "ca")
        for name in ("tls", "client"):
            certificate(tmp_path, name, "-CA", "ca.crt", "-CAkey", "ca.key")
        files = ((tmp_path / name).read_bytes() for name in ("ca.crt", "client.key", "client.crt"))
        credentials = grpc.ssl_channel_credentials(*files)
    with Process(*words, *QUICK, folder=tmp_path) as started:
        address = f"localhost:{started.wait_for('serving')['grpc_port']}"
        opened = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
        with opened as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert started.end() == 0


def test_nginx_takes_the_configuration_and_reloads_it(tmp_path: Path) -> None:
    """Also for external clients, as its comment says: with another line to listen on, and a certificate."""
    given = [shlex.split(command)[1:] for command in commands("docs/operating.md") if command.startswith("nginx ")]
    assert given == [["-t"], ["-s", "reload"]]
    certificate(tmp_path, "tls")
    with nginx(tmp_path / "nginx", ["127.0.0.1:50051", "127.0.0.1:50052"]) as running:
        for options in given:
            assert "error" not in running.command(*options)
        text = (tmp_path / "nginx/rafaga.conf").read_text()
        assert "# For external clients: `listen 443 ssl http2`, ssl_certificate and ssl_certificate_key." in text
        plain = f"listen {running.address} http2;"
        assert plain in text
        files = f"ssl_certificate {tmp_path}/tls.crt; ssl_certificate_key {tmp_path}/tls.key;"
        changed = text.replace(plain, f"listen {running.address} ssl http2; {files}")
        (tmp_path / "nginx/rafaga.conf").write_text(changed)
        assert "test is successful" in running.command("-t")
