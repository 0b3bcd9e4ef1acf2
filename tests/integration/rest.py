"""Requests over HTTP, and what came back."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np

from tests.integration.serving import PATIENCE_S, Served


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of a refusal; the body must have nothing else."""
        assert self.status >= 400, self
        assert self.headers["content-type"] == "application/json"
        assert self.json.keys() == {"error"}
        return str(self.json["error"])


def send(
    served: Served,
    path: str,
    body: bytes | str | Mapping[str, Any] | Iterable[bytes] | None = None,
    method: str | None = None,
    **headers: str,
) -> Answer:
    """GET, or POST with a body; a mapping is sent as JSON. Headers with _ for -."""
    if isinstance(body, Mapping):
        body = json.dumps(body)
    chunked = body is not None and not isinstance(body, bytes | str)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with closing(http.client.HTTPConnection("127.0.0.1", served.server.http_port, timeout=PATIENCE_S)) as connection:
        method = method or ("GET" if body is None else "POST")
        connection.request(method, path, body, named, encode_chunked=chunked)
        answer = connection.getresponse()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())


def raw_connection(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.server.http_port), timeout=PATIENCE_S)


def head(path: str, length: int, *more: str) -> bytes:
    """Of a POST over a raw connection."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}", *more, "", ""]
    return "\r\n".join(lines).encode()


def tensor(name: str, array: np.ndarray, datatype: str) -> dict[str, Any]:
    """An input in JSON, flat."""
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.ravel().tolist()}
