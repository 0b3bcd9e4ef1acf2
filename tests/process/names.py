"""A name server for one name, whose addresses change while clients ask."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

NAME = "rafaga.test"
_TYPE_A = 1
_FLAGS = 0x8580  # an answer, authoritative, no error
_POINTER_TO_THE_QUESTION = 0xC00C


class NameServer:
    """Answers every question with `addresses` (those of type A) or with nothing, each valid for no longer than now."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = list(addresses)
        self.asked = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))

    def target(self, port: int) -> str:
        """What a gRPC client connects to."""
        return f"dns://127.0.0.1:{self._socket.getsockname()[1]}/{NAME}:{port}"

    def serve(self) -> None:
        while True:
            query, client = self._socket.recvfrom(512)
            if not query:
                return
            self._socket.sendto(self._answer(query), client)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self._socket.getsockname())

    def _answer(self, query: bytes) -> bytes:
        end = query.index(b"\0", 12) + 5  # a header of 12 bytes, the name, type and class
        (kind,) = struct.unpack(">H", query[end - 4 : end - 2])
        found = list(self.addresses) if kind == _TYPE_A else []
        self.asked += kind == _TYPE_A
        records = b"".join(
            struct.pack(">HHHIH", _POINTER_TO_THE_QUESTION, _TYPE_A, 1, 0, 4) + socket.inet_aton(ip) for ip in found
        )
        return query[:2] + struct.pack(">HHHHH", _FLAGS, 1, len(found), 0, 0) + query[12:end] + records


@contextmanager
def naming(addresses: Sequence[str]) -> Iterator[NameServer]:
    server = NameServer(addresses)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()
        server._socket.close()
