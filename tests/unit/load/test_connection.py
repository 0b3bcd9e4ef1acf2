"""How many addresses share the calls, as far as the command can know."""

from __future__ import annotations

import socket

import pytest

from rafaga.load.connection import Connection


@pytest.mark.parametrize(
    ("address", "count"),
    [
        ("127.0.0.1:1", 1),
        ("127.0.0.1:1,127.0.0.1:2,127.0.0.2:1", 3),
        ("[::1]:1,[::1]:2", 2),
        ("unix:/tmp/socket", 1),
        ("dns:///replicas:50051", 2),
        ("dns:replicas:50051", 2),
        ("dns:///replicas", 2),
        ("dns:///unknown:50051", 1),
    ],
)
def test_addresses_are_counted(address: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name has two addresses of IPv4, one of them in IPv6 too."""

    def look_up(name: str, port: None) -> list[tuple[socket.AddressFamily, int, int, str, tuple[str, int]]]:
        if name != "replicas":
            raise socket.gaierror("unknown")
        addresses = ("10.0.0.1", "10.0.0.2", "10.0.0.2", "fd00::1")
        return [(socket.AF_INET6 if ":" in ip else socket.AF_INET, 0, 0, "", (ip, 0)) for ip in addresses]

    monkeypatch.setattr("rafaga.load.connection.socket.getaddrinfo", look_up)
    assert Connection(address).addresses() == count
