"""How addresses are written: "host:port", "[::1]:port" for IPv6, and "unix:/path" for gRPC on a Unix socket."""

from __future__ import annotations

UNIX = "unix:"


def joined(host: str, port: int) -> str:
    """ "host:port", with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
