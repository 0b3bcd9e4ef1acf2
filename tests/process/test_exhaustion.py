"""What runs out, comes back: files under a flood of connections, calls in flight, memory after large images."""

from __future__ import annotations

import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from tests import bundles
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, Stubs, connected, eventually, get, refusal_of
from tests.process.running import Running, running

MIB = 2**20
FILES = 512
FLOOD = 400
CALLS = 10_000


def healthy(served: Running) -> bool:
    """Over gRPC on the connection that is there, and over HTTP on a new one."""
    status = served.health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S).status
    return status == health_pb2.HealthCheckResponse.SERVING and get(f"{served.http}/healthz")[0] == 200


def test_a_flood_of_connections_leaves_health_answering(repository: Path) -> None:
    """1. The process may open 512 files, and 800 connections come. 2. Health answers on both ports, and a call on the
    connection from before. 3. They go: new clients are served."""
    with running(repository, files=FILES) as served:
        assert healthy(served)
        with ExitStack() as flood:  # nothing is sent on them
            for address in [served.address, served.http.removeprefix("http://")] * FLOOD:
                host, _, port = address.rpartition(":")
                flood.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE_S))
            for _ in range(5):
                assert healthy(served)
            served.vision.Classify(messages.classify(messages.random_digits(0)), timeout=PATIENCE_S)
            assert served.metric("process_open_fds") < FILES

        def a_new_client_is_served() -> bool:
            try:
                with connected(served.address) as channel:
                    Stubs(channel).vision.Classify(messages.classify(messages.random_digits(0)), timeout=PATIENCE_S)
            except grpc.RpcError:  # the server has not closed the others yet
                return False
            return healthy(served)

        eventually(a_new_client_is_served, "new clients are served")
        assert not any(line.fields.get("level") == "ERROR" for line in served.process.log)


def test_memory_returns_after_large_images(repository: Path) -> None:
    """By default glibc would keep more than 100 MiB for later images."""
    files = [messages.png(np.zeros((side, side, 3), np.uint8)) for side in range(1000, 4000, 400)]
    with running(repository, "--max-queue-wait-ms", "60000") as served:

        def classify(number: int) -> None:
            served.vision.Classify(messages.classify_files(files[number * 3 % 8]), timeout=PATIENCE_S)

        served.vision.Classify(messages.classify(messages.random_digits(0)), timeout=PATIENCE_S)
        before = served.metric("process_resident_memory_bytes")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(classify, range(24)))
        most = before + 64 * MIB
        eventually(lambda: served.metric("process_resident_memory_bytes") < most, "memory returned")


@pytest.mark.nightly
def test_ten_thousand_calls_at_once(tmp_path: Path) -> None:
    """More than the server holds: each is answered, or refused with a reason and a time to retry. Health answers
    meanwhile."""
    bundles.publish_slow(tmp_path, products=0)
    request = messages.classify(messages.random_digits(0), "slow")
    with running(tmp_path, "--max-queue-wait-ms", "600000") as served, ExitStack() as stack:
        # A connection has at most 1,024 streams.
        options = (("grpc.use_local_subchannel_pool", 1),)
        channels = [stack.enter_context(grpc.insecure_channel(served.address, options)) for _ in range(16)]
        stubs = [Stubs(channel).vision for channel in channels]
        before = served.metric("process_resident_memory_bytes")
        calls = [stubs[n % 16].Classify.future(request, timeout=PATIENCE_S) for n in range(CALLS)]
        most = 0.0
        while not all(call.done() for call in calls):
            assert healthy(served)
            most = max(most, served.metric("rafaga_requests_in_flight"))
        assert 0 < most <= 4096
        assert served.metric("process_resident_memory_bytes") < before + 256 * MIB
        reasons = Counter(refusal_of(error).reason if (error := call.exception()) else "OK" for call in calls)
        assert reasons.total() == CALLS
        assert reasons.keys() == {"OK", "QUEUE_FULL"}
        assert served.metric("rafaga_requests_in_flight") == 0
