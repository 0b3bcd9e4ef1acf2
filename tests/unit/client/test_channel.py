"""Addresses and options as gRPC wants them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rafaga import Keepalive, Tls
from rafaga.client._channel import endpoint


@pytest.mark.parametrize(
    ("address", "target", "balanced"),
    [
        ("localhost", "localhost:50051", False),
        ("http://localhost", "localhost:50051", False),
        ("GRPC://localhost:1/", "localhost:1", False),
        ("http://10.0.0.1,http://10.0.0.2:2", "ipv4:10.0.0.1:50051,10.0.0.2:2", True),
        ("[::1]", "[::1]:50051", False),
        ("10.0.0.1:1, 10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2", True),
        ("[::1]:1,[::2]:2", "ipv6:[::1]:1,[::2]:2", True),
        ("localhost:1,127.0.0.1:2", "ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("dns:///rafaga.models.svc:50051", "dns:///rafaga.models.svc:50051", True),
        ("unix:/run/rafaga.sock", "unix:/run/rafaga.sock", False),
    ],
)
def test_addresses(address: str, target: str, balanced: bool) -> None:
    made = endpoint(address)
    assert made.target == target
    config = json.loads(str(dict(made.options).get("grpc.service_config", "{}")))
    assert config == ({"loadBalancingConfig": [{"round_robin": {}}]} if balanced else {})


UNBRACKETED = ("::1:50051", "::1", "fe80::1:50051,[::1]:1", "[::1:50051")
INVALID = ("", "  ", ":50051", "host:port", "host:0", "host:70000", "a:1,", "10.0.0.1:1,[::1]:2", "http://h/path", "[]")


@pytest.mark.parametrize("address", INVALID + UNBRACKETED)
def test_invalid_addresses(address: str) -> None:
    with pytest.raises(ValueError, match="in brackets" if address in UNBRACKETED else "."):
        endpoint(address)


def test_a_scheme_decides_about_tls_and_names_are_looked_up() -> None:
    assert endpoint("http://h:1").credentials is None
    for address in ("https://h:1", "grpcs://h:1"):
        assert endpoint(address).credentials is not None
    assert endpoint("grpc://h:1", tls=Tls()).credentials is not None
    with pytest.raises(ValueError, match="plain text"):
        endpoint("http://h:1", tls=Tls())
    with pytest.raises(ValueError, match="with and without TLS"):
        endpoint("http://h:1,https://h:2")
    with pytest.raises(OSError) as ended:
        endpoint("127.0.0.1:1,nosuch.invalid:1")
    assert ended.value.filename == "nosuch.invalid", "which name does not resolve"


@pytest.mark.parametrize(
    ("address", "authority"),
    [
        ("localhost:1", None),
        ("dns:///rafaga:1", None),
        ("10.0.0.1:1,10.0.0.2:2", "10.0.0.1:1"),
        ("localhost:1,127.0.0.1:2", "localhost:1"),
        ("[::1]:1,[::2]:2", "[::1]:1"),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", "10.0.0.1:1"),
    ],
)
def test_a_list_calls_itself_by_its_first_address(address: str, authority: str | None) -> None:
    """HTTP/2 allows no commas in :authority; strict servers answer such a call with a protocol error."""
    assert dict(endpoint(address).options).get("grpc.default_authority") == authority
    secured = dict(endpoint(address, tls=Tls(server_name="models")).options)
    assert secured.get("grpc.default_authority") == (authority and "models")


def test_limits_and_keepalive_are_always_set() -> None:
    options = dict(endpoint("h:1", max_message_bytes=123, keepalive=Keepalive(5, 2.5, while_idle=True)).options)
    assert options["grpc.max_send_message_length"] == options["grpc.max_receive_message_length"] == 123
    assert options["grpc.keepalive_time_ms"] == 5000
    assert options["grpc.keepalive_timeout_ms"] == options["grpc.http2.ping_timeout_ms"] == 2500
    assert options["grpc.keepalive_permit_without_calls"] == 1
    assert dict(endpoint("h:1").options)["grpc.max_send_message_length"] == 64 * 1024 * 1024


def test_secrets_are_not_in_reprs() -> None:
    tls = Tls(private_key=b"hunter2", certificate_chain=b"x")
    made = endpoint("h:1", token="hunter2", tls=tls)
    assert made.metadata == (("authorization", "Bearer hunter2"),)
    assert "hunter2" not in repr((made, tls))


def test_the_certificate_of_a_list_is_checked_against_its_first_name() -> None:
    assert dict(endpoint("localhost:1,localhost:2", tls=Tls()).options)["grpc.ssl_target_name_override"] == "localhost"
    assert "grpc.ssl_target_name_override" not in dict(endpoint("localhost:1", tls=Tls()).options)
    override = dict(endpoint("10.0.0.1:1", tls=Tls(server_name="models")).options)["grpc.ssl_target_name_override"]
    assert override == "models"


def test_tls_files(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(b"ca")
    assert Tls.from_files(tmp_path / "ca.pem") == Tls(root_certificates=b"ca")
    with pytest.raises(OSError):
        Tls.from_files(tmp_path / "absent.pem")
    with pytest.raises(ValueError):
        Tls(private_key=b"key without its chain")
