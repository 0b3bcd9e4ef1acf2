"""How addresses are written: "host", "host:port", "[::1]:port" for IPv6, with or without a scheme; "unix:/path" for
gRPC on a Unix socket."""

from __future__ import annotations

from urllib.parse import urlsplit

UNIX = "unix:"
GRPC_PORT = 50051
HTTP_PORT = 8080
"""Ports of a server by default, and of an address without a port."""

# Whether gRPC runs over TLS; None: the caller's other options decide.
_SCHEMES = {"grpc": None, "http": False, "https": True, "grpcs": True}


def joined(host: str, port: int) -> str:
    """ "host:port", with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split(address: str, default_port: int) -> tuple[str, int]:
    """(host, port) of "host", "host:port", "[::1]" or "[::1]:port". Raises ValueError."""
    text = address.strip()
    host, colon, port = (
        (text, "", "") if text.endswith("]") else text.rpartition(":") if ":" in text else (text, "", "")
    )
    if (
        not host.strip("[]")
        or (colon and not (port.isdecimal() and 0 < int(port) < 65536))
        or any(c in host for c in " /@")
    ):
        raise ValueError(f"{text!r} is not a valid address; use HOST:PORT, or several separated by commas")
    if ":" in host and not (host[0] == "[" and host[-1] == "]"):
        raise ValueError(f"{text!r}: write an IPv6 address in brackets, as in [::1]:{default_port}")
    return host.strip("[]"), int(port) if colon else default_port


def without_scheme(address: str) -> tuple[str, bool | None]:
    """One gRPC address, or several separated by commas, without their schemes; and whether these ask for TLS.

    http:// and https:// name the gRPC port, without and with TLS, as in other gRPC clients. grpc:// is the same as no
    scheme: None, other options decide. Schemes of gRPC itself, such as dns:///, stay. Raises ValueError.
    """
    parts, secured = [], set()
    for part in address.split(","):
        scheme, separator, rest = part.strip().partition("://")
        if separator and scheme.lower() in _SCHEMES:
            secured.add(_SCHEMES[scheme.lower()])
            part = rest.removesuffix("/")
        else:
            secured.add(None)
        parts.append(part)
    if len(secured) > 1:
        raise ValueError(f"{address}: addresses with and without TLS cannot share one client")
    return ",".join(parts), secured.pop()


def metrics_url(address: str) -> str:
    """The URL of /metrics of a server: "host", "host:port" or "http://host:port" of its HTTP port, or the whole URL.

    Raises ValueError.
    """
    if "://" not in address:
        return f"http://{joined(*split(address, HTTP_PORT))}/metrics"
    return address if urlsplit(address).path.strip("/") else address.rstrip("/") + "/metrics"
