"""What one caller can cost the others: sizes, compression, streams, resets, slow readers, unfinished calls, noise.

docs/transports.md has the table that these tests prove.
"""

from __future__ import annotations

import socket
from collections import Counter
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from rafaga.priority import PRIORITY_KEY
from rafaga.v1 import vision_pb2
from tests import bundles
from tests.integration import http2, messages
from tests.integration.serving import PATIENCE_S, Serve, Served, Stubs, assert_serves, connected, eventually, refusal
from tests.integration.valve import Valve

RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
CLASSIFY = "/rafaga.v1.Vision/Classify"
FEATURES = "/rafaga.v1.Vision/ExtractFeatures"
IMAGE = messages.random_digits(0)
MIB = 2**20


def ask(stubs: Stubs, image: np.ndarray = IMAGE, **options: Any) -> vision_pb2.ClassifyResponse:
    return stubs.vision.Classify(messages.classify(image), timeout=PATIENCE_S, **options)


def served_by(channel: Any) -> bool:
    call = Stubs(channel).vision.Classify.future(messages.classify(IMAGE), timeout=PATIENCE_S)
    return call.code() is grpc.StatusCode.OK


def test_connections_over_the_limit_are_closed_and_the_others_served(serve: Serve) -> None:
    served = serve(max_connections=2)
    with connected(served.address) as second:
        assert served_by(served.channel)
        assert served_by(second)
        with served.another_connection() as third:
            assert refusal(lambda: ask(third)).code is grpc.StatusCode.UNAVAILABLE
        assert served_by(served.channel)
        assert served.get("/healthz")[0] == 200
    with connected(served.address) as fourth:
        eventually(lambda: served_by(fourth), "the place of the closed connection is free")


# --- Sizes ------------------------------------------------------------------------------------------------------------


def test_what_is_too_large_or_compressed_is_refused_and_the_connection_goes_on(serve: Serve) -> None:
    """Thirty compressed megabytes of zeros are thirty kilobytes on the wire: refused before they are inflated."""
    served = serve(max_request_bytes=MIB)
    cases: list[tuple[np.ndarray, dict[str, Any], set[grpc.StatusCode]]]
    twice, more = np.zeros((2 * MIB // 784, 28, 28, 1), np.uint8), np.zeros((30 * MIB // 784, 28, 28, 1), np.uint8)
    zipped, padding = {"compression": grpc.Compression.Gzip}, (("padding", "x" * 100_000),)
    exhausted, unimplemented = {RESOURCE_EXHAUSTED}, {grpc.StatusCode.UNIMPLEMENTED}
    cases = [
        (twice, {}, exhausted),
        (IMAGE, zipped, unimplemented),
        (more, zipped, unimplemented),
        (IMAGE, {"metadata": padding}, exhausted | {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL}),
    ]
    for image, options, codes in cases:
        assert refusal(lambda image=image, options=options: ask(served, image, **options)).code in codes
        assert_serves(served)


def test_a_message_at_the_limit_is_taken(serve: Serve) -> None:
    request = messages.classify(messages.random_digits(1, 1000), top_k=1)
    served = serve(max_request_bytes=request.ByteSize())
    assert len(served.vision.Classify(request).results) == 1000


def test_a_message_is_refused_by_its_declared_size_before_it_is_buffered(server: Served) -> None:
    """The prefix declares a gigabyte; ten bytes follow, and no more. The answer must not wait for the rest."""
    with http2.raw_connection(server.port) as connection:
        prefix = b"\0" + (2**30).to_bytes(4, "big")
        connection.send(http2.headers(1, CLASSIFY) + http2.data(1, prefix + bytes(10), end_stream=False))
        assert connection.until_stream_ends(1)[-1].ends_stream


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_thousands_of_concurrent_calls_are_answered_or_refused_with_a_reason_and_health_is_not(
    serve: Serve, valve: Valve
) -> None:
    """1. The engine stands. 2. 3000 calls come over three connections. 3. It goes on: each got exactly one answer."""
    served = serve(max_concurrent_calls=64)
    with ExitStack() as stack:
        stubs = [Stubs(stack.enter_context(connected(served.address))).vision for _ in range(3)]
        request = messages.classify(IMAGE)
        with valve.closed():
            calls = [stubs[n % 3].Classify.future(request, timeout=PATIENCE_S) for n in range(3000)]
            eventually(lambda: sum(call.done() for call in calls) >= 3000 - 64, "what is too much was refused")
            refused = refusal(lambda: ask(served))
            assert (refused.code, refused.reason) == (RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert getattr(refused.error, "retry_after_s", 0) > 0
            health = served.health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert Counter(call.code() for call in calls) == {grpc.StatusCode.OK: 64, RESOURCE_EXHAUSTED: 3000 - 64}
        for call in calls:
            if call.code() is grpc.StatusCode.OK:
                assert messages.probabilities(call.result()) == pytest.approx(bundles.classify(IMAGE), abs=1e-5)
    assert served.metric("rafaga_refusals_total", reason="QUEUE_FULL") == 3000 - 64 + 1
    assert_serves(served)


def test_bytes_in_flight_are_bounded(serve: Serve, valve: Valve) -> None:
    request = messages.classify(IMAGE)
    size = request.ByteSize()
    served = serve(max_request_bytes=size, max_bytes_in_flight=4 * size)
    with valve.closed():
        accepted = [served.vision.Classify.future(request) for _ in range(4)]
        eventually(lambda: served.in_flight == 4, "all are in flight")
        refused = refusal(lambda: ask(served))
        assert (refused.code, refused.reason) == (RESOURCE_EXHAUSTED, "QUEUE_FULL")
        accepted.append(served.vision.Classify.future(request, metadata=((PRIORITY_KEY, "high"),)))
        eventually(lambda: served.in_flight == 5, "the urgent have a quarter of their own")
    assert all(call.result(PATIENCE_S).results for call in accepted)
    assert_serves(served)


def test_a_connection_has_a_bounded_number_of_streams(server: Served) -> None:
    """The server says how many it takes, and refuses what a client opens beyond."""
    with http2.raw_connection(server.port) as connection:
        settings = next(f for f in connection.frames() if f.kind == http2.SETTINGS and not f.flags & http2.ACK)
        pairs = [settings.payload[i : i + 6] for i in range(0, len(settings.payload), 6)]
        limits = {int.from_bytes(p[:2], "big"): int.from_bytes(p[2:], "big") for p in pairs}
        assert limits[3] == 1024  # SETTINGS_MAX_CONCURRENT_STREAMS
        connection.until_pong()  # the server holds a client to it from its acknowledgement on
        connection.send(b"".join(http2.headers(2 * i + 1, CLASSIFY) for i in range(1124)))
        beyond, ended = {2 * i + 1 for i in range(1024, 1124)}, set[int]()
        for frame in connection.frames():
            if frame.ends_stream:
                ended.add(frame.stream)
            if frame.kind == http2.GOAWAY or ended >= beyond:
                break
        else:
            pytest.fail("what is beyond the limit was not refused")
    assert_serves(server)


# --- Rudeness ---------------------------------------------------------------------------------------------------------


def test_rapid_reset_harms_no_other_caller(server: Served) -> None:
    """Ten times a thousand calls, opened and reset at once; a neighbour is answered in between."""
    for _ in range(10):
        with http2.raw_connection(server.port) as connection, suppress(ConnectionError):
            # The server may well close on such a client.
            opened = (http2.call(2 * i + 1, CLASSIFY, messages.classify(IMAGE)) for i in range(1000))
            connection.send(b"".join(call + http2.reset(2 * i + 1) for i, call in enumerate(opened)))
            connection.until_pong()
        assert ask(server).results
    assert_serves(server)


def test_a_burst_of_cancellations_costs_no_other_call_of_the_connection(serve: Serve, valve: Valve) -> None:
    """One call waits for the engine; a hundred others of its connection are opened and cancelled in one breath."""
    served = serve()
    with http2.raw_connection(served.port) as connection:
        with valve.closed():
            connection.send(http2.call(1, CLASSIFY, messages.classify(IMAGE)))
            valve.wait_for_engine()
            streams = range(3, 203, 2)
            connection.send(b"".join(http2.headers(stream, CLASSIFY) + http2.reset(stream) for stream in streams))
            connection.until_pong()
        assert http2.DATA in {frame.kind for frame in connection.until_stream_ends(1)}
    assert_serves(served)


def test_unread_replies_hold_up_no_other_caller(serve: Serve) -> None:
    """Twelve replies of 768 KiB for a client that lets the server send only the start of each. They no longer count as
    in flight: what bounds them is the number of streams of a connection."""
    served = serve(max_concurrent_calls=4)
    photo = messages.features_files(messages.black_png(512, 512))
    with http2.raw_connection(served.port, window=1000) as connection:
        for i in range(12):
            connection.send(http2.call(2 * i + 1, FEATURES, photo))
            eventually(lambda done=i + 1: served.metric("rafaga_requests_total", code="OK") == done, "it was computed")
        with served.another_connection() as neighbour:
            assert not messages.maps(neighbour.vision.ExtractFeatures(photo, timeout=PATIENCE_S))[0].any()
    assert_serves(served)


def test_a_call_without_a_message_fails(server: Served) -> None:
    """Half-closed before anything was said, and in the middle of a message; or reset there."""
    half = http2.grpc_message(messages.classify(IMAGE))[:100]
    with http2.raw_connection(server.port) as connection:
        connection.send(http2.headers(1, CLASSIFY, end_stream=True))
        assert [f.kind for f in connection.until_stream_ends(1)] == [http2.HEADERS]
        connection.send(http2.headers(3, CLASSIFY) + http2.data(3, half))
        assert [f.kind for f in connection.until_stream_ends(3)] == [http2.HEADERS]
        connection.send(http2.headers(5, CLASSIFY) + http2.data(5, half, end_stream=False))
        connection.until_pong()
        connection.send(http2.reset(5) + http2.call(7, CLASSIFY, messages.classify(IMAGE)))
        assert http2.DATA in {f.kind for f in connection.until_stream_ends(7)}
    assert_serves(server)


def test_calls_that_never_finish_asking_leave_room_for_others(serve: Serve) -> None:
    """A hundred uploads stop half-way. Other calls are served, and the room is free when their connection ends."""
    served = serve(max_concurrent_calls=4)
    half = http2.grpc_message(messages.classify(IMAGE))[:100]
    with http2.raw_connection(served.port) as connection:
        for i in range(100):
            connection.send(http2.headers(2 * i + 1, CLASSIFY) + http2.data(2 * i + 1, half, end_stream=False))
        connection.until_pong()
        assert ask(served).results
    assert_serves(served)


OPENED = http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0)
NOISE = {
    "nothing": b"",
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "noise": np.random.default_rng(0).bytes(100_000),
    "noise after preface": http2.PREFACE + np.random.default_rng(1).bytes(100_000),
    "bad HPACK": OPENED + http2.frame(http2.HEADERS, 4, 1, b"\xff" * 50),
    "huge frame": OPENED + b"\xff\xff\xff\0\0\0\0\0\1" + bytes(1000),
    "window overflow": OPENED + http2.frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 3,
}


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE.keys())
def test_noise_on_the_port_harms_no_caller(server: Served, noise: bytes) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as client, suppress(OSError):
            client.sendall(noise)  # the server may hang up
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass
    assert_serves(server)
