"""Who may call: bearer tokens, TLS and client certificates."""

from __future__ import annotations

import hashlib
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rafaga.cli import main
from rafaga.errors import Unauthenticated
from rafaga.plan import measure
from rafaga.server.config.settings import ConfigError
from tests.integration import messages
from tests.integration.serving import (
    PATIENCE_S,
    Serve,
    Served,
    Stubs,
    assert_refused,
    connected,
    get,
    serving,
)

TOKEN = "correct horse battery staple"
IMAGE = messages.random_digits(0)


@pytest.fixture(scope="module")
def guarded(repository: Path) -> Iterator[Served]:
    """A server that knows two tokens."""
    hashes = tuple(hashlib.sha256(token.encode()).hexdigest() for token in ("another", TOKEN))
    with serving(repository, bearer_token_sha256=hashes) as served:
        yield served


def classify(served: Served, *authorization: str) -> Any:
    metadata = tuple(("authorization", value) for value in authorization)
    return served.vision.Classify(messages.classify(IMAGE), metadata=metadata, timeout=PATIENCE_S)


def test_a_known_token_is_let_in(guarded: Served) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert classify(guarded, f"{scheme} {TOKEN}").results
    assert classify(guarded, "Bearer another").results


@pytest.mark.parametrize(
    "authorization",
    [(), ("",), ("Bearer",), ("Bearer ",), ("Bearer wrong",), (TOKEN,), (f"Basic {TOKEN}",), (f"bearer{TOKEN}",)],
    ids=str,
)
def test_anything_else_is_not(guarded: Served, authorization: tuple[str, ...]) -> None:
    message = assert_refused(lambda: classify(guarded, *authorization), Unauthenticated)
    assert TOKEN not in message


def test_refused_callers_are_counted_and_learn_nothing_of_the_models(guarded: Served) -> None:
    before = guarded.metric("rafaga_refusals_total", reason="UNAUTHENTICATED")
    unknown = messages.classify(IMAGE, "unknown")
    assert "digits" not in assert_refused(lambda: guarded.vision.Classify(unknown), Unauthenticated)
    assert guarded.metric("rafaga_refusals_total", reason="UNAUTHENTICATED") == before + 1


def test_reflection_needs_a_token_and_health_does_not(guarded: Served) -> None:
    response = guarded.health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    assert response.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(guarded.channel)

    def services(*metadata: tuple[str, str]) -> set[str]:
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        answer = next(stub.ServerReflectionInfo(asked, metadata=metadata, timeout=PATIENCE_S))
        return {service.name for service in answer.list_services_response.service}

    assert_refused(services, Unauthenticated)
    assert "rafaga.v1.Vision" in services(("authorization", f"Bearer {TOKEN}"))


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys and certificates of an authority, of a server and a client that it signed, and of a
    stranger."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command, which makes the certificates, is not installed")
    folder = tmp_path_factory.mktemp("certificates")

    def new(name: str, *extra: str) -> None:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key")
        command = ("openssl", "req", "-x509", *key, "-out", f"{name}.pem", "-days", "2", "-subj", f"/CN={name}", *extra)
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    new("authority")
    new("stranger")
    signed = ("-CA", "authority.pem", "-CAkey", "authority.key", "-addext", "basicConstraints=critical,CA:FALSE")
    new("server", *signed, "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    new("client", *signed)
    return folder


@pytest.fixture
def tls(repository: Path, pems: Path) -> Iterator[Serve]:
    """Starts servers with TLS."""
    with ExitStack() as stack:
        files = {"tls_key": pems / "server.key", "tls_certificate": pems / "server.pem"}
        yield lambda **settings: stack.enter_context(serving(repository, **files | settings))


def ask(served: Served, roots: Path, client: str | None = None) -> grpc.StatusCode | None:
    """How a call over TLS fails; `client`: whose certificate is shown."""
    chain = [roots.with_name(f"{client}{kind}").read_bytes() for kind in (".key", ".pem")] if client else []
    credentials = grpc.ssl_channel_credentials(roots.read_bytes(), *chain)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    with grpc.secure_channel(f"localhost:{served.port}", credentials, options) as channel:
        return failure(channel)


def failure(channel: grpc.Channel) -> grpc.StatusCode | None:
    stubs = Stubs(channel)
    try:
        assert stubs.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S).results
        health = stubs.health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    except grpc.RpcError as error:
        return error.code()
    return None


def test_tls_serves_those_who_trust_its_authority(tls: Serve, pems: Path) -> None:
    served = tls()
    assert ask(served, pems / "authority.pem") is None
    assert ask(served, pems / "stranger.pem") is grpc.StatusCode.UNAVAILABLE
    with connected(served.address) as plaintext:
        assert failure(plaintext) is grpc.StatusCode.UNAVAILABLE


def test_mtls_lets_in_signed_clients_alone(tls: Serve, pems: Path) -> None:
    served = tls(tls_client_ca=pems / "authority.pem")
    assert ask(served, pems / "authority.pem", "client") is None
    for client in (None, "stranger"):
        assert ask(served, pems / "authority.pem", client) is grpc.StatusCode.UNAVAILABLE


def test_renewed_certificates_are_served_without_a_restart(tls: Serve, pems: Path, tmp_path: Path) -> None:
    """1. The files are replaced: new connections get the new certificate. 2. By files that do not belong together: the
    certificate before them stays in use."""
    key, certificate = tmp_path / "tls.key", tmp_path / "tls.pem"

    def put(key_of: str, certificate_of: str) -> None:
        for source, target in ((f"{key_of}.key", key), (f"{certificate_of}.pem", certificate)):
            (renewed := target.with_suffix(".new")).write_bytes((pems / source).read_bytes())
            renewed.replace(target)

    put("server", "server")
    served = tls(tls_key=key, tls_certificate=certificate)
    for files, in_use in (None, "server"), (("stranger", "stranger"), "stranger"), (("client", "server"), "stranger"):
        if files:
            put(*files)
        for port in (served.port, served.server.http_port):
            found = ssl.get_server_certificate(("localhost", port)).strip()
            assert found == (pems / f"{in_use}.pem").read_text().strip()


def https(served: Served, path: str, pems: Path, client: str | None = None) -> int:
    """The status of a GET; `client`: whose certificate is shown."""
    context = ssl.create_default_context(cafile=pems / "authority.pem")
    if client is not None:
        context.load_cert_chain(pems / f"{client}.pem", pems / f"{client}.key")
    try:
        url = f"https://localhost:{served.server.http_port}{path}"
        with urllib.request.urlopen(url, timeout=PATIENCE_S, context=context) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_http_has_the_same_certificate(tls: Serve, pems: Path) -> None:
    served = tls()
    assert [https(served, path, pems) for path in ("/readyz", "/metrics", "/v1/models")] == [200] * 3
    with pytest.raises(OSError):
        get(f"http://localhost:{served.server.http_port}/readyz")


def test_http_calls_need_a_client_certificate_and_probes_do_not(tls: Serve, pems: Path) -> None:
    served = tls(tls_client_ca=pems / "authority.pem")
    for path in ("/readyz", "/healthz", "/metrics", "/v2/health/ready"):
        assert https(served, path, pems) == 200
    for path in ("/v1/models", "/v1/models/digits", "/v2/models/digits"):
        assert [https(served, path, pems, client) for client in (None, "client")] == [401, 200]
    with pytest.raises(OSError):
        https(served, "/v1/models", pems, "stranger")
    assert served.server.router.in_flight.count == 0


def test_a_key_of_another_certificate_is_named_at_the_start(tls: Serve, pems: Path) -> None:
    with pytest.raises(ConfigError, match=r"server.pem"):
        tls(tls_key=pems / "client.key")


def test_the_commands_show_their_certificate(
    tls: Serve, pems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "CALLERS", (1,))
    server = f"localhost:{tls(tls_client_ca=pems / 'authority.pem').port}"
    trusting = ["--tls-ca", str(pems / "authority.pem"), "--tls-key", str(pems / "client.key")]
    load = ["load", "--server", server, "--model", "digits", "--rate", "20", "--duration", "0.3", "--warm-up", "0"]
    plan = ["plan", "--measure", server, "--model", "digits", "--step", "0.2", "--profile", str(tmp_path / "profile")]
    for command in (["models", "--server", server], load, plan):
        assert main([*command, *trusting, "--tls-certificate", str(pems / "client.pem")]) == 0
        assert main([*command, *trusting[:2]]) == 3, "no certificate, no connection"
        assert main([*command, *trusting]) == 2


def test_metrics_over_tls(tls: Serve, pems: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trusting = ["--tls-ca", str(pems / "authority.pem")]
    served = tls()
    url = f"https://localhost:{served.server.http_port}"
    assert main(["top", url, "--once", "--interval", "0.05", *trusting]) == 0
    assert main(["top", url, "--once", "--interval", "0.05"]) == 3
    assert "CERTIFICATE_VERIFY_FAILED" in capsys.readouterr().err
    load = ["load", "--server", f"https://localhost:{served.port}", "--model", "digits", "--rate", "20", *trusting]
    assert main([*load, "--duration", "0.3", "--warm-up", "0", "--metrics", url]) == 0
