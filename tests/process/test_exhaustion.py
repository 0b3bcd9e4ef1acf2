"""What runs out, comes back: open files under a flood of connections, and memory after large images."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from grpc_health.v1 import health_pb2

from tests.integration import messages
from tests.integration.serving import PATIENCE_S, Stubs, connected, eventually, get
from tests.process.running import Running, running

FILES = 512
FLOOD = 400


@contextmanager
def flood(served: Running) -> Iterator[None]:
    """More connections than the process may have files, to both ports; nothing is sent on them."""
    with ExitStack() as stack:
        for address in [served.address, served.http.removeprefix("http://")] * FLOOD:
            host, _, port = address.rpartition(":")
            stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE_S))
        yield


def healthy(served: Running) -> bool:
    """Over gRPC on the connection that is there, and over HTTP on a new one."""
    status = served.health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S).status
    return status == health_pb2.HealthCheckResponse.SERVING and get(f"{served.http}/healthz")[0] == 200


def test_a_flood_of_connections_leaves_health_answering(repository: Path) -> None:
    """1. The process may open 512 files, and 800 connections come. 2. Health answers on both ports, and a call on the
    connection from before. 3. They go: new clients are served."""
    with running(repository, files=FILES) as served:
        assert healthy(served)
        with flood(served):
            for _ in range(5):
                assert healthy(served)
            served.vision.Classify(messages.classify(messages.random_digits(0)), timeout=PATIENCE_S)
            assert served.metric("process_open_fds") < FILES

        def a_new_client_is_served() -> bool:
            with connected(served.address) as channel:
                Stubs(channel).vision.Classify(messages.classify(messages.random_digits(0)), timeout=PATIENCE_S)
            return healthy(served)

        eventually(a_new_client_is_served, "new clients are served")
        assert not any(line.fields.get("level") == "ERROR" for line in served.process.log)
