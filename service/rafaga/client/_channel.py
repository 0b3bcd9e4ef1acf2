"""How a client reaches its servers: addresses, balancing, TLS, token, keepalive and limits as gRPC options."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from rafaga.addresses import GRPC_PORT, UNIX, joined, split, without_scheme
from rafaga.priority import PRIORITY_KEY, Priority

DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024 * 1024

# A server that restarts is found again within this time; gRPC's own default backs off up to two minutes.
_RECONNECT_BACKOFF_MS = (100, 2000)
_MIN_TIME_BETWEEN_LOOKUPS_MS = 1000


@dataclass(frozen=True)
class Tls:
    """PEM contents. `root_certificates` None: the system's. Key and chain together: the client's own identity (mTLS).

    `server_name`: the name to check the certificate against, where it differs from the address.

    >>> client = Client("models.example:443", tls=Tls.from_files("ca.pem"), token=token)  # doctest: +SKIP
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    certificate_chain: bytes | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ValueError("private_key and certificate_chain come together")

    @classmethod
    def from_files(
        cls,
        root_certificates: str | Path | None = None,
        private_key: str | Path | None = None,
        certificate_chain: str | Path | None = None,
        server_name: str | None = None,
    ) -> Tls:
        """Reads PEM files. Raises OSError."""
        roots, key, chain = (
            None if path is None else Path(path).read_bytes()
            for path in (root_certificates, private_key, certificate_chain)
        )
        return cls(roots, key, chain, server_name)


@dataclass(frozen=True)
class Keepalive:
    """HTTP/2 pings that find a dead connection. Servers close connections that ping more often than they allow.

    `while_idle`: also while no call is open; behind proxies that drop idle connections.
    """

    interval_s: float = 30.0
    timeout_s: float = 10.0
    while_idle: bool = False


@dataclass(frozen=True)
class Endpoint:
    """Everything that is needed to open a channel."""

    address: str  # for messages: one with its port, several as the user wrote them
    target: str
    options: tuple[tuple[str, str | int], ...]
    credentials: grpc.ChannelCredentials | None
    metadata: tuple[tuple[str, str], ...] = field(repr=False)


def chosen(address: str | None) -> str:
    """`address`, or RAFAGA_SERVER of the environment, or a server on this machine."""
    return address or os.environ.get("RAFAGA_SERVER") or "localhost:50051"


def endpoint(
    address: str,
    *,
    tls: Tls | None = None,
    token: str | None = None,
    keepalive: Keepalive | None = None,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    priority: Priority = Priority.NORMAL,
) -> Endpoint:
    """Raises ValueError for a malformed address, OSError when one of several names does not resolve."""
    address, over_tls = without_scheme(address)
    if over_tls is False and tls is not None:
        raise ValueError(f"http://{address} is plain text, and TLS options are given: write https:// or no scheme")
    if over_tls and tls is None:
        tls = Tls()
    target, balanced = _target(address)
    keepalive = keepalive or Keepalive()
    options: list[tuple[str, str | int]] = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", round(keepalive.interval_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(keepalive.timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", int(keepalive.while_idle)),
        # Of any ping: while one that measures the connection waits for its answer, a minute, no other is sent.
        ("grpc.http2.ping_timeout_ms", round(keepalive.timeout_s * 1000)),
        ("grpc.initial_reconnect_backoff_ms", _RECONNECT_BACKOFF_MS[0]),
        ("grpc.min_reconnect_backoff_ms", _RECONNECT_BACKOFF_MS[0]),
        ("grpc.max_reconnect_backoff_ms", _RECONNECT_BACKOFF_MS[1]),
        # Each client has its own connections: closing one, or its backoff, does not affect another client.
        ("grpc.use_local_subchannel_pool", 1),
        # After an update, when every replica has a new address, gRPC would resolve the name again only after 30 s.
        ("grpc.dns_min_time_between_resolutions_ms", _MIN_TIME_BETWEEN_LOOKUPS_MS),
    ]
    if balanced:
        options.append(("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})))
    # A list of addresses has no name of its own. gRPC would send all of it as :authority, which HTTP/2 does not allow.
    first = re.sub("^ipv[46]:/*", "", address.split(",")[0].strip()) if target.startswith(("ipv4:", "ipv6:")) else None
    credentials = None
    if tls is not None:
        credentials = grpc.ssl_channel_credentials(tls.root_certificates, tls.private_key, tls.certificate_chain)
        name = tls.server_name or (split(first, GRPC_PORT)[0] if first else None)
        if name:
            options.append(("grpc.ssl_target_name_override", name))
            first = first and name
    if first:
        options.append(("grpc.default_authority", first))
    metadata: tuple[tuple[str, str], ...] = (("authorization", f"Bearer {token}"),) if token else ()
    if priority is not Priority.NORMAL:
        metadata += ((PRIORITY_KEY, priority.word),)
    return Endpoint(address if balanced else target, target, tuple(options), credentials, metadata)


def _target(address: str) -> tuple[str, bool]:
    """gRPC's target, and whether to spread calls over what it resolves to."""
    if not address.strip():
        raise ValueError("the address is empty; expected HOST:PORT")
    if "://" in address or address.startswith((UNIX, "ipv4:", "ipv6:", "dns:")):
        return address, not address.startswith(UNIX)
    hosts = [split(part, GRPC_PORT) for part in address.split(",")]
    if len(hosts) == 1:
        return joined(*hosts[0]), False
    # gRPC takes lists of literal addresses only; names are looked up once, here. `dns:///name:port` follows changes.
    resolved = [_literal(host, port) for host, port in hosts]
    versions = {ip.version for ip, _ in resolved}
    if len(versions) > 1:
        raise ValueError(f"{address}: IPv4 and IPv6 addresses cannot share one client")
    scheme = "ipv6:" if versions == {6} else "ipv4:"
    return scheme + ",".join(joined(str(ip), port) for ip, port in resolved), True


def _literal(host: str, port: int) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    try:
        return ipaddress.ip_address(host), port
    except ValueError:
        try:
            names = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise OSError(error.errno, error.strerror, host) from None  # which of the names
        # IPv4 first: names of one machine often have both, and the parts of a list must agree.
        found = sorted(names, key=lambda entry: entry[0])
        return ipaddress.ip_address(found[0][4][0]), port
