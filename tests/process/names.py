"""A name server for one name."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address
from socketserver import BaseRequestHandler, UDPServer

_TYPE_A = 1
_FLAGS = 0x8580  # an answer, authoritative, no error
_POINTER_TO_THE_QUESTION = 0xC00C


@contextmanager
def naming(addresses: Sequence[str]) -> Iterator[str]:
    """Answers every question with `addresses` (those of type A) or with nothing. Gives what gRPC clients connect to,
    without the port."""

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            query, socket = self.request
            end = query.index(b"\0", 12) + 5  # a header of 12 bytes, the name, type and class
            (kind,) = struct.unpack(">H", query[end - 4 : end - 2])
            found = addresses if kind == _TYPE_A else ()
            records = [
                struct.pack(">HHHIH", _POINTER_TO_THE_QUESTION, _TYPE_A, 1, 0, 4) + IPv4Address(ip).packed
                for ip in found
            ]
            header = query[:2] + struct.pack(">HHHHH", _FLAGS, 1, len(found), 0, 0)
            socket.sendto(header + query[12:end] + b"".join(records), self.client_address)

    with UDPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"dns://127.0.0.1:{server.server_address[1]}/rafaga.test"
        server.shutdown()
        thread.join()
