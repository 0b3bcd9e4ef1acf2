"""What one caller can cost the others: sizes, compression, streams, resets, slow readers, unfinished calls, noise.

docs/transports.md has the table that these tests prove.
"""

from __future__ import annotations

import socket
from collections import Counter
from contextlib import ExitStack
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


def oversize(size: int) -> vision_pb2.ClassifyRequest:
    pixels = vision_pb2.ImageTensor(data=bytes(size), batch=1, height=28, width=28, channels=1)
    return vision_pb2.ClassifyRequest(model="digits", pixels=pixels)


def test_connections_over_the_limit_are_closed_and_the_others_served(serve: Serve) -> None:
    served = serve(max_connections=2)
    with connected(served.address) as second:
        assert serves(served.channel)
        assert serves(second)
        with served.another_connection() as third:
            refused = refusal(lambda: third.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S))
            assert refused.code is grpc.StatusCode.UNAVAILABLE
        assert serves(served.channel)
        assert served.get("/healthz")[0] == 200
    with connected(served.address) as fourth:
        eventually(lambda: serves(fourth), "the place of the closed connection is free")


def serves(channel: Any) -> bool:
    call = Stubs(channel).vision.Classify.future(messages.classify(IMAGE), timeout=PATIENCE_S)
    return call.code() is grpc.StatusCode.OK


# --- Sizes ------------------------------------------------------------------------------------------------------------


def test_a_message_over_the_limit_is_refused_and_the_connection_goes_on(serve: Serve) -> None:
    served = serve(max_request_bytes=MIB)
    for _ in range(3):
        assert refusal(lambda: served.vision.Classify(oversize(2 * MIB))).code is RESOURCE_EXHAUSTED
        answer = served.vision.Classify(messages.classify(IMAGE))
        assert messages.probabilities(answer) == pytest.approx(bundles.classify(IMAGE), abs=1e-5)
    assert_serves(served)


def test_a_message_at_the_limit_is_taken(serve: Serve) -> None:
    images = messages.random_digits(1, 1000)
    request = messages.classify(images, top_k=1)
    served = serve(max_request_bytes=request.ByteSize())
    assert len(served.vision.Classify(request).results) == 1000


def test_a_message_is_refused_by_its_declared_size_before_it_is_buffered(serve: Serve) -> None:
    """The prefix declares a gigabyte; ten bytes follow, and no more. The answer must not wait for the rest."""
    served = serve()
    with http2.raw_connection(served.port) as connection:
        prefix = b"\0" + (2**30).to_bytes(4, "big")
        connection.send(http2.headers(1, CLASSIFY) + http2.data(1, prefix + bytes(10), end_stream=False))
        found = connection.until_stream_ends(1, silence_s=PATIENCE_S)
        assert found
        assert found[-1].ends_stream


def test_compressed_requests_are_refused_before_they_are_inflated(serve: Serve) -> None:
    """Thirty megabytes of zeros are thirty kilobytes on the wire."""
    served = serve(max_request_bytes=MIB)
    for request in (messages.classify(IMAGE), oversize(30 * MIB)):
        refused = refusal(lambda request=request: served.vision.Classify(request, compression=grpc.Compression.Gzip))
        assert refused.code is grpc.StatusCode.UNIMPLEMENTED
    assert_serves(served)


def test_metadata_over_the_limit_is_refused(serve: Serve) -> None:
    served = serve()
    metadata = (("padding", "x" * 100_000),)
    refused = refusal(lambda: served.vision.Classify(messages.classify(IMAGE), metadata=metadata, timeout=PATIENCE_S))
    assert refused.code in (RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
    assert_serves(served)


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_calls_beyond_the_limit_are_refused_with_a_reason_and_health_is_not(serve: Serve, valve: Valve) -> None:
    served = serve(max_concurrent_calls=8)
    with valve.closed():
        accepted = [served.vision.Classify.future(messages.classify(IMAGE)) for _ in range(8)]
        eventually(lambda: served.in_flight == 8, "all are in flight")
        for _ in range(20):
            refused = refusal(lambda: served.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S))
            assert (refused.code, refused.reason) == (RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert getattr(refused.error, "retry_after_s", 0) > 0
        health = served.health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert all(call.result(PATIENCE_S).results for call in accepted)
    assert served.metric("rafaga_refusals_total", reason="QUEUE_FULL") == 20
    assert_serves(served)


def test_bytes_in_flight_are_bounded(serve: Serve, valve: Valve) -> None:
    size = messages.classify(IMAGE).ByteSize()
    served = serve(max_request_bytes=size, max_bytes_in_flight=4 * size)
    with valve.closed():
        accepted = [served.vision.Classify.future(messages.classify(IMAGE)) for _ in range(4)]
        eventually(lambda: served.in_flight == 4, "all are in flight")
        refused = refusal(lambda: served.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S))
        assert (refused.code, refused.reason) == (RESOURCE_EXHAUSTED, "QUEUE_FULL")
        accepted.append(served.vision.Classify.future(messages.classify(IMAGE), metadata=((PRIORITY_KEY, "high"),)))
        eventually(lambda: served.in_flight == 5, "the urgent have a quarter of their own")
    assert all(call.result(PATIENCE_S).results for call in accepted)
    assert_serves(served)


def test_thousands_of_concurrent_calls_are_answered_or_refused(serve: Serve, valve: Valve) -> None:
    """1. The engine stands. 2. 3000 calls come over three connections. 3. It goes on: each got exactly one answer."""
    served = serve(max_concurrent_calls=64)
    request = messages.classify(IMAGE).SerializeToString()
    with ExitStack() as stack:
        channels = [stack.enter_context(connected(served.address)) for _ in range(3)]
        with valve.closed():
            calls = [
                channel.unary_unary(CLASSIFY).future(request, timeout=PATIENCE_S)
                for _ in range(1000)
                for channel in channels
            ]
            eventually(lambda: sum(call.done() for call in calls) >= 3000 - 64, "what is too much was refused")
        codes = Counter(call.code() for call in calls)
        assert codes == {grpc.StatusCode.OK: 64, RESOURCE_EXHAUSTED: 3000 - 64}
        for call in calls:
            if call.code() is grpc.StatusCode.OK:
                found = messages.probabilities(vision_pb2.ClassifyResponse.FromString(call.result()))
                assert found == pytest.approx(bundles.classify(IMAGE), abs=1e-5)
    assert_serves(served)


def test_a_connection_has_a_bounded_number_of_streams(serve: Serve, valve: Valve) -> None:
    """The server says how many it takes, and refuses what a client opens beyond."""
    served = serve()
    with http2.raw_connection(served.port) as connection:
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
    assert_serves(served)


# --- Rudeness ---------------------------------------------------------------------------------------------------------


def test_rapid_reset_harms_no_other_caller(serve: Serve) -> None:
    """Ten times a thousand calls, opened and reset at once; a neighbour is answered in between."""
    served = serve()
    for _ in range(10):
        with http2.raw_connection(served.port) as connection:
            opened = (http2.call(2 * i + 1, CLASSIFY, messages.classify(IMAGE)) for i in range(1000))
            try:
                connection.send(b"".join(call + http2.reset(2 * i + 1) for i, call in enumerate(opened)))
                connection.until_pong()
            except ConnectionError:
                pass  # the server may well close on such a client
        assert served.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S).results
    assert_serves(served)


def test_a_burst_of_cancellations_costs_no_other_call_of_the_connection(serve: Serve, valve: Valve) -> None:
    """One call waits for the engine; a hundred others of its connection are opened and cancelled in one breath."""
    served = serve()
    with http2.raw_connection(served.port) as connection:
        with valve.closed():
            connection.send(http2.call(1, CLASSIFY, messages.classify(IMAGE)))
            valve.wait_for_engine()
            connection.send(
                b"".join(http2.headers(2 * i + 1, CLASSIFY) + http2.reset(2 * i + 1) for i in range(1, 101))
            )
            connection.until_pong()
        answer = connection.until_stream_ends(1)
        assert http2.DATA in {frame.kind for frame in answer}
    assert_serves(served)


def test_unread_replies_hold_up_no_other_caller(serve: Serve) -> None:
    """Twelve replies of 768 KiB for a client that lets the server send only the start of each. They no longer count as
    in flight: what bounds them is the number of streams of a connection."""
    served = serve(max_concurrent_calls=4)
    photo = messages.black_png(512, 512)
    with http2.raw_connection(served.port, window=1000) as connection:
        for i in range(12):
            connection.send(http2.call(2 * i + 1, FEATURES, messages.features_files(photo)))
            eventually(lambda done=i + 1: served.metric("rafaga_requests_total", code="OK") == done, "it was computed")
        with served.another_connection() as neighbour:
            answer = neighbour.vision.ExtractFeatures(messages.features_files(photo), timeout=PATIENCE_S)
            assert not messages.maps(answer)[0].any()
    assert_serves(served)


def test_a_call_without_a_message_fails(serve: Serve) -> None:
    """Half-closed before anything was said, and in the middle of a message."""
    served = serve()
    half = http2.grpc_message(messages.classify(IMAGE))[:100]
    with http2.raw_connection(served.port) as connection:
        connection.send(http2.headers(1, CLASSIFY, end_stream=True))
        assert [f.kind for f in connection.until_stream_ends(1)] == [http2.HEADERS]
        connection.send(http2.headers(3, CLASSIFY) + http2.data(3, half))
        assert [f.kind for f in connection.until_stream_ends(3)] == [http2.HEADERS]
        connection.send(http2.call(5, CLASSIFY, messages.classify(IMAGE)))
        assert http2.DATA in {f.kind for f in connection.until_stream_ends(5)}
    assert_serves(served)


def test_calls_that_never_finish_asking_leave_room_for_others(serve: Serve) -> None:
    """A hundred uploads stop half-way. Other calls are served, and the room is free when their connection ends."""
    served = serve(max_concurrent_calls=4)
    half = http2.grpc_message(messages.classify(IMAGE))[:100]
    with http2.raw_connection(served.port) as connection:
        for i in range(100):
            connection.send(http2.headers(2 * i + 1, CLASSIFY) + http2.data(2 * i + 1, half, end_stream=False))
        connection.until_pong()
        assert served.vision.Classify(messages.classify(IMAGE), timeout=PATIENCE_S).results
    assert_serves(served)


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        np.random.default_rng(0).bytes(100_000),
        http2.PREFACE + np.random.default_rng(1).bytes(100_000),
        http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0) + http2.frame(http2.HEADERS, 4, 1, b"\xff" * 50),
        http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0) + b"\xff\xff\xff\0\0\0\0\0\1" + bytes(1000),
        http2.PREFACE
        + http2.frame(http2.SETTINGS, 0, 0)
        + http2.frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 3,
    ],
    ids=["nothing", "HTTP/1.1", "TLS", "noise", "noise after preface", "bad HPACK", "huge frame", "window overflow"],
)
def test_noise_on_the_port_harms_no_caller(server: Served, noise: bytes) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as client:
            try:
                client.sendall(noise)
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    pass
            except OSError:
                pass  # the server may hang up
    assert_serves(server)


def test_many_idle_connections_harm_no_caller(server: Served) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), PATIENCE_S))
        assert_serves(server)
