"""Who may call: bearer tokens, TLS and client certificates."""

from __future__ import annotations

import hashlib
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rafaga.cli import main
from rafaga.plan import measure
from rafaga.server.app import build
from rafaga.server.config.settings import Config, ConfigError
from rafaga.v1 import vision_pb2_grpc
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, Served, connected, get, refusal, serving

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
    refused = refusal(lambda: classify(guarded, *authorization))
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert TOKEN not in refused.message


def test_refused_callers_are_counted_and_learn_nothing_of_the_models(guarded: Served) -> None:
    before = guarded.metric("rafaga_refusals_total", reason="UNAUTHENTICATED")
    refused = refusal(lambda: guarded.vision.Classify(messages.classify(IMAGE, "unknown"), timeout=PATIENCE_S))
    assert refused.code is grpc.StatusCode.UNAUTHENTICATED
    assert "digits" not in refused.message
    assert guarded.metric("rafaga_refusals_total", reason="UNAUTHENTICATED") == before + 1


def test_health_needs_no_token(guarded: Served) -> None:
    response = guarded.health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_needs_a_token(guarded: Served) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(guarded.channel)

    def services(*metadata: tuple[str, str]) -> set[str]:
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        answer = next(stub.ServerReflectionInfo(asked, metadata=metadata, timeout=PATIENCE_S))
        return {service.name for service in answer.list_services_response.service}

    assert refusal(services).code is grpc.StatusCode.UNAUTHENTICATED
    assert "rafaga.v1.Vision" in services(("authorization", f"Bearer {TOKEN}"))


# --- TLS --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificates:
    """PEM files: an authority, and a server's and a client's key and certificate signed by it."""

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command, which makes the certificates, is not installed")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    def new(name: str, *extra: str) -> None:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key")
        openssl("req", "-x509", *key, "-out", f"{name}.pem", "-days", "2", "-subj", f"/CN={name}", *extra)

    constraints = ("-addext", "basicConstraints=critical,CA:FALSE")
    new("authority")
    new("stranger")
    signed = ("-CA", "authority.pem", "-CAkey", "authority.key")
    new("server", *signed, *constraints, "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    new("client", *signed, *constraints)
    return Certificates(folder)


@contextmanager
def secure_channel(port: int, roots: bytes, key: bytes | None = None, chain: bytes | None = None) -> Iterator[Any]:
    credentials = grpc.ssl_channel_credentials(roots, key, chain)
    with grpc.secure_channel(
        f"localhost:{port}", credentials, [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    ) as channel:
        yield channel


def ask(channel: grpc.Channel) -> Any:
    return vision_pb2_grpc.VisionStub(channel).Classify(messages.classify(IMAGE), timeout=PATIENCE_S)


@pytest.fixture
def tls(repository: Path, certificates: Certificates) -> Iterator[Callable[..., int]]:
    """Starts a server with TLS; gives its port."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(serving_tls(repository, certificates, **settings)).port


def serving_tls(repository: Path, certificates: Certificates, **settings: Any) -> AbstractContextManager[Served]:
    key, certificate = certificates.path("server.key"), certificates.path("server.pem")
    return serving(repository, tls_key=key, tls_certificate=certificate, **settings)


def test_tls_serves_those_who_trust_its_authority(tls: Callable[..., int], certificates: Certificates) -> None:
    port = tls()
    with secure_channel(port, certificates.read("authority.pem")) as channel:
        assert ask(channel).results
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_with_tls_there_is_no_plaintext(tls: Callable[..., int], certificates: Certificates) -> None:
    port = tls()
    with connected(f"127.0.0.1:{port}") as channel:
        assert refusal(lambda: ask(channel)).code is grpc.StatusCode.UNAVAILABLE
    with secure_channel(port, certificates.read("stranger.pem")) as channel:
        assert refusal(lambda: ask(channel)).code is grpc.StatusCode.UNAVAILABLE


def test_mtls_lets_in_signed_clients_alone(tls: Callable[..., int], certificates: Certificates) -> None:
    port = tls(tls_client_ca=certificates.path("authority.pem"))
    roots = certificates.read("authority.pem")
    with secure_channel(port, roots, certificates.read("client.key"), certificates.read("client.pem")) as channel:
        assert ask(channel).results
    with secure_channel(port, roots) as channel:
        assert refusal(lambda: ask(channel)).code is grpc.StatusCode.UNAVAILABLE
    with secure_channel(port, roots, certificates.read("stranger.key"), certificates.read("stranger.pem")) as channel:
        assert refusal(lambda: ask(channel)).code is grpc.StatusCode.UNAVAILABLE


def test_renewed_certificates_are_served_without_a_restart(
    repository: Path, certificates: Certificates, tmp_path: Path
) -> None:
    """1. The files are replaced: new connections get the new certificate. 2. By files that do not belong together: the
    certificate before them stays in use."""
    key, certificate = tmp_path / "tls.key", tmp_path / "tls.pem"

    def put(key_of: str, certificate_of: str) -> None:
        for source, target in ((f"{key_of}.key", key), (f"{certificate_of}.pem", certificate)):
            (renewed := target.with_suffix(".new")).write_bytes(certificates.read(source))
            renewed.replace(target)

    def served_certificate() -> str:
        on_grpc, on_http = (ssl.get_server_certificate(("localhost", port)).strip() for port in ports)
        assert on_grpc == on_http
        return on_grpc

    put("server", "server")
    with serving(repository, tls_key=key, tls_certificate=certificate) as served:
        ports = (served.port, served.server.http_port)
        assert served_certificate() == certificates.read("server.pem").decode().strip()
        put("stranger", "stranger")
        assert served_certificate() == certificates.read("stranger.pem").decode().strip()
        put("client", "server")
        assert served_certificate() == certificates.read("stranger.pem").decode().strip()


def https(served: Served, path: str, certificates: Certificates, client: str | None = None) -> int:
    """The status of a GET; `client`: whose certificate is shown."""
    context = ssl.create_default_context(cafile=certificates.path("authority.pem"))
    if client is not None:
        context.load_cert_chain(certificates.path(f"{client}.pem"), certificates.path(f"{client}.key"))
    try:
        url = f"https://localhost:{served.server.http_port}{path}"
        with urllib.request.urlopen(url, timeout=PATIENCE_S, context=context) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_http_has_the_same_certificate(repository: Path, certificates: Certificates) -> None:
    with serving_tls(repository, certificates) as served:
        assert [https(served, path, certificates) for path in ("/readyz", "/metrics", "/v1/models")] == [200] * 3
        with pytest.raises(OSError):
            get(f"http://localhost:{served.server.http_port}/readyz")


def test_http_calls_need_a_client_certificate_and_probes_do_not(repository: Path, certificates: Certificates) -> None:
    authority = certificates.path("authority.pem")
    with serving_tls(repository, certificates, tls_client_ca=authority) as served:
        for path in ("/readyz", "/healthz", "/metrics", "/v2/health/ready"):
            assert https(served, path, certificates) == 200
        for path in ("/v1/models", "/v1/models/digits", "/v2/models/digits"):
            assert https(served, path, certificates) == 401
            assert https(served, path, certificates, "client") == 200
        with pytest.raises(OSError):
            https(served, "/v1/models", certificates, "stranger")
        assert served.server.router.in_flight.count == 0


def test_a_key_of_another_certificate_is_named_at_the_start(repository: Path, certificates: Certificates) -> None:
    key, certificate = certificates.path("client.key"), certificates.path("server.pem")
    with pytest.raises(ConfigError, match=r"server.pem"):
        build(Config.of(repository=repository, tls_key=key, tls_certificate=certificate))


def test_the_commands_show_their_certificate(
    tls: Callable[..., int], certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "CALLERS", (1,))
    server = f"localhost:{tls(tls_client_ca=certificates.path('authority.pem'))}"
    trusting = ["--tls-ca", str(certificates.path("authority.pem"))]
    key, certificate = str(certificates.path("client.key")), str(certificates.path("client.pem"))
    known = [*trusting, "--tls-key", key, "--tls-certificate", certificate]
    load = ["load", "--server", server, "--model", "digits", "--rate", "20", "--duration", "0.3", "--warm-up", "0"]
    plan = ["plan", "--measure", server, "--model", "digits", "--step", "0.2", "--profile", str(tmp_path / "profile")]
    for command in (["models", "--server", server], load, plan):
        assert main([*command, *known]) == 0
        assert main([*command, *trusting]) == 3, "no certificate, no connection"
        assert main([*command, *trusting, "--tls-key", key]) == 2


def test_metrics_over_tls(repository: Path, certificates: Certificates, capsys: pytest.CaptureFixture[str]) -> None:
    certificate = certificates.path("server.pem")
    trusting = ["--tls-ca", str(certificates.path("authority.pem"))]
    with serving(repository, tls_key=certificates.path("server.key"), tls_certificate=certificate) as served:
        url = f"https://localhost:{served.server.http_port}"
        assert main(["top", url, "--once", "--interval", "0.05", *trusting]) == 0
        assert main(["top", url, "--once", "--interval", "0.05"]) == 3
        assert "CERTIFICATE_VERIFY_FAILED" in capsys.readouterr().err
        load = ["load", "--server", f"https://localhost:{served.port}", "--model", "digits", "--rate", "20", *trusting]
        assert main([*load, "--duration", "0.3", "--warm-up", "0", "--metrics", url]) == 0
