"""grpc.health.v1 as probes and watchers see it, over a real channel."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rafaga.server.transport.health import MAX_WATCHES, Health

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
WAIT_S = 30.0


class Served:
    def __init__(self) -> None:
        self.ready = {"": False}
        self.alive = True
        self.health = Health(
            lambda: "" if self.ready[""] else "loading", lambda name: self.ready[name], lambda: self.alive
        )
        self.pool = ThreadPoolExecutor(MAX_WATCHES + 4)
        self.server = grpc.server(self.pool)
        self.health.add_to(self.server)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}")
        self.server.start()
        self.stub = health_pb2_grpc.HealthStub(self.channel)

    def report(self, name: str, ready: bool) -> None:
        self.ready[name] = ready
        self.health.changed(name)

    def check(self, service: str = "") -> int:
        return int(self.stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S).status)

    def watch(self, service: str = "") -> Iterator[int]:
        for answer in self.stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S):
            yield int(answer.status)

    def close(self) -> None:
        self.health.close()
        self.channel.close()
        self.server.stop(0).wait(WAIT_S)
        self.pool.shutdown()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


def test_a_watcher_never_keeps_an_older_state(served: Served) -> None:
    """Two threads report changes at a time: the state is read when it is sent, so their order does not matter."""
    watch = served.watch("digits")
    assert next(watch) == UNKNOWN
    served.report("digits", True)
    assert next(watch) == SERVING
    served.ready["digits"] = False
    threads = [threading.Thread(target=served.health.changed, args=("digits",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert next(watch) == NOT_SERVING
    for thread in threads:
        thread.join(WAIT_S)


def test_liveness_ends_where_a_restart_is_required(served: Served) -> None:
    """For good after a death."""
    served.ready[""] = True
    for alive in (False, True):
        served.alive = alive
        assert (served.check("rafaga.v1.Catalog") == SERVING, served.health.alive, served.check() == SERVING) == (
            alive,
        ) * 3
    served.health.die()
    assert (served.check("rafaga.v1.Catalog"), served.health.alive, served.check()) == (NOT_SERVING, False, NOT_SERVING)


def test_a_watcher_gets_every_change(served: Served) -> None:
    watch = served.watch("digits")
    assert next(watch) == UNKNOWN
    for ready, status in ((False, NOT_SERVING), (True, SERVING), (False, NOT_SERVING)):
        served.report("digits", ready)
        assert next(watch) == status
    served.health.close()
    assert list(watch) == []


def test_a_watcher_that_does_not_read_blocks_no_other(served: Served) -> None:
    silent = served.stub.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
    next(silent)
    for n in range(500):
        served.report("", bool(n % 2))
    assert served.check() == SERVING
    silent.cancel()
