"""HTTP/2 frames by hand (RFC 9113), for clients that no library lets one write: rude, slow, half-finished.

Headers go out as literals without compression (RFC 7541, 6.2.2); those that come back are not decoded.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO, NamedTuple

from google.protobuf.message import Message

from tests.integration.serving import PATIENCE_S

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
INITIAL_WINDOW_SIZE = 4
CANCEL = 8


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def ends_stream(self) -> bool:
        return self.kind == RST_STREAM or (self.kind in (DATA, HEADERS) and bool(self.flags & END_STREAM))


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers(stream: int, method: str, *more: tuple[str, str], end_stream: bool = False) -> bytes:
    """The HEADERS frame that opens a gRPC call."""
    fields = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", "test"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *more,
    )
    return _headers(stream, fields, end_stream)


def response_headers(stream: int, *fields: tuple[str, str]) -> bytes:
    """An answer without a message."""
    return _headers(stream, fields, end_stream=True)


def _headers(stream: int, fields: Sequence[tuple[str, str]], end_stream: bool) -> bytes:
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)
    return frame(HEADERS, END_HEADERS | (END_STREAM if end_stream else 0), stream, block)


def data(stream: int, payload: bytes, *, end_stream: bool = True) -> bytes:
    return frame(DATA, END_STREAM if end_stream else 0, stream, payload)


def reset(stream: int) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))


def grpc_message(message: Message | bytes) -> bytes:
    """The 5-byte prefix and the message."""
    content = message if isinstance(message, bytes) else message.SerializeToString()
    return struct.pack(">BI", 0, len(content)) + content


def call(stream: int, method: str, message: Message, *more: tuple[str, str]) -> bytes:
    """A whole unary call."""
    return headers(stream, method, *more) + data(stream, grpc_message(message))


class RawConnection:
    def __init__(self, opened: socket.socket, replies: BinaryIO, window: int) -> None:
        self._socket = opened
        self._replies = replies
        self.send(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, window)))

    def send(self, content: bytes) -> None:
        self._socket.sendall(content)

    def frames(self) -> Iterator[Frame]:
        """What the server sends, until it closes the connection or is silent for the socket's timeout.

        SETTINGS and PING are answered on the way.
        """
        while len(prefix := self._read(9)) == 9:
            kind, flags, stream = struct.unpack(">BBI", prefix[3:])
            received = Frame(kind, flags, stream, self._read(int.from_bytes(prefix[:3], "big")))
            if kind in (SETTINGS, PING) and not flags & ACK:
                self._try_to_send(frame(kind, ACK, 0, received.payload if kind == PING else b""))
            yield received

    def until_stream_ends(self, stream: int) -> list[Frame]:
        """The frames of `stream`; the last one ends it, unless the connection ended or was silent first."""
        found = self._until(lambda frame: frame.stream == stream and frame.ends_stream)
        return [frame for frame in found if frame.stream == stream]

    def until_pong(self) -> list[Frame]:
        """What came until the server answered a ping, and so has read all that was sent before it.

        Not to be done all the time: servers close on clients that ping too much.
        """
        self._try_to_send(frame(PING, 0, 0, b"are you?"))
        return self._until(lambda frame: frame.kind == PING and bool(frame.flags & ACK))

    def _until(self, last: Callable[[Frame], bool]) -> list[Frame]:
        found: list[Frame] = []
        for received in self.frames():
            found.append(received)
            if last(received):
                break
        return found

    def _read(self, length: int) -> bytes:
        try:
            return self._replies.read(length)
        except OSError:
            return b""

    def _try_to_send(self, content: bytes) -> None:
        with suppress(ConnectionError):  # `frames` will see the end
            self.send(content)


@contextmanager
def raw_connection(port: int, window: int = 1 << 20) -> Iterator[RawConnection]:
    """`window`: how many bytes of each reply the server may send before it is allowed more."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as opened, opened.makefile("rb") as replies:
        yield RawConnection(opened, replies, window)


@contextmanager
def scripted_server(*answers: bytes) -> Iterator[int]:
    """Its port. Each connection gets one answer, to its first call, and stays open."""

    def serve() -> None:
        for answer in answers:
            peer = stack.enter_context(listener.accept()[0])
            requests = stack.enter_context(peer.makefile("rb"))
            requests.read(len(PREFACE))
            peer.sendall(frame(SETTINGS, 0, 0))
            kind = SETTINGS
            while kind != HEADERS:
                prefix = requests.read(9)
                kind = prefix[3]
                requests.read(int.from_bytes(prefix[:3], "big"))
            peer.sendall(answer)

    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(PATIENCE_S)
        thread = threading.Thread(target=serve)
        thread.start()
        stack.callback(thread.join)
        yield listener.getsockname()[1]


def _text(value: str) -> bytes:
    """A short string literal, not Huffman-coded (RFC 7541, 5.1 and 5.2)."""
    assert len(value) < 127
    return bytes([len(value)]) + value.encode()
