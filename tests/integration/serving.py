"""A real server inside this process, on free ports, and what tests ask of it."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from grpc_health.v1 import health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from rafaga.errors import STATUS_DETAILS_KEY, RafagaError, from_status
from rafaga.server.app import build
from rafaga.server.config.device import Device
from rafaga.server.config.settings import Config
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace
from rafaga.server.engines.selection import EngineFactory, Placement
from rafaga.server.lifecycle import Server
from rafaga.server.repository.trial_process import DirectTrials
from rafaga.server.scheduling.latency import LatencyTable
from rafaga.v1 import catalog_pb2_grpc, forecasting_pb2_grpc, sequences_pb2_grpc, vision_pb2_grpc
from tests import bundles
from tests.integration import messages

PATIENCE_S = 60.0
"""How long a test waits for what must happen; long, because other work may hold the cores."""


class Stubs:
    """The generated stubs over one channel."""

    def __init__(self, channel: Any) -> None:  # a grpc.Channel, whose types do not know calls of bytes
        self.channel = channel
        self.vision = vision_pb2_grpc.VisionStub(channel)
        self.forecasting = forecasting_pb2_grpc.ForecastingStub(channel)
        self.sequences = sequences_pb2_grpc.SequencesStub(channel)
        self.catalog = catalog_pb2_grpc.CatalogStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)


class Served(Stubs):
    """A running server, with stubs that are connected to it."""

    def __init__(self, server: Server, channel: Any, latencies: Mapping[str, LatencyTable]) -> None:
        super().__init__(channel)
        self.latencies = latencies  # by model
        self.server = server

    @property
    def port(self) -> int:
        return self.server.grpc_port

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @contextmanager
    def another_connection(self) -> Iterator[Stubs]:
        with connected(self.address) as channel:
            yield Stubs(channel)

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.server.http_port}"

    def get(self, path: str) -> tuple[int, str]:
        return get(self.http + path)

    def metric(self, name: str, **labels: str) -> float:
        return metric_of(self.http, name, **labels)

    @property
    def in_flight(self) -> int:
        return int(self.metric("rafaga_requests_in_flight"))

    def predict(self, model: str, seconds: float) -> None:
        """As if warm-up had measured `seconds` for one run of `model`, so that refusals need no slow model."""
        table = self.latencies[model]
        LatencyTable.__init__(table, (1, table.buckets[-1]), (seconds, seconds))


Serve = Callable[..., Served]
"""A server on a repository, by default the one of all tests, with the given settings."""


@contextmanager
def serving(repository: Path, engine_factory: EngineFactory = Placement.load, **settings: Any) -> Iterator[Served]:
    config = Config.of(
        **{
            "repository": repository,
            "threads": ("1",),
            "engine": "onnxruntime",  # what is measured differs from run to run
            "engine_timeout_s": 600.0,  # tests hold engines up, and other work may hold the cores
            "grpc_port": 0,
            "http_port": 0,
        }
        | settings
    )
    latencies: dict[str, LatencyTable] = {}

    def load(placement: Placement, device: Device, model: ModelToPlace) -> LoadedEngine:
        loaded = engine_factory(placement, device, model)
        latencies[model.spec.name] = loaded.latency
        return loaded

    server = build(config, load, DirectTrials())
    server.start()
    try:
        with connected(f"127.0.0.1:{server.grpc_port}") as channel:
            yield Served(server, channel, latencies)
    finally:
        hurry = threading.Event()
        hurry.set()  # no test ends while replies are on their way
        server.drain_and_stop(hurry)


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """A connection of its own: channels of equal arguments would otherwise share one."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
    ]
    with grpc.insecure_channel(address, options) as channel:
        yield channel


def free_port() -> int:
    """One that is free on every address."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def get(url: str) -> tuple[int, str]:
    """GET over HTTP: status and body."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def metric_of(http: str, name: str, **labels: str) -> float:
    """The sum of all samples of `name` whose labels include `labels`."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(get(f"{http}/metrics")[1])
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


class Refusal(NamedTuple):
    """How a call failed. `reason` is None when the status carries no google.rpc.ErrorInfo of ours."""

    code: grpc.StatusCode
    reason: str | None
    error: RafagaError

    @property
    def message(self) -> str:
        return self.error.message


def refusal(call: Callable[[], Any]) -> Refusal:
    """How `call` is refused; fails the test when it is not."""
    try:
        answer = call()
    except grpc.RpcError as error:
        return refusal_of(error)
    raise AssertionError(f"expected a refusal, got {answer!r:.200}")


def refusal_of(error: Any) -> Refusal:
    trailing = tuple((key, value) for key, value in error.trailing_metadata() or ())
    typed = from_status(error.code(), error.details() or "", trailing)
    return Refusal(error.code(), typed.reason if STATUS_DETAILS_KEY in dict(trailing) else None, typed)


def assert_refused(call: Callable[[], Any], error: type[RafagaError], *says: str) -> str:
    """`call` fails with the status of `error`, and each of `says` is in the message, which is returned."""
    refused = refusal(call)
    assert (refused.code, refused.reason) == (error.code, error.reason), refused.message
    assert [each for each in says if each not in refused.message] == [], refused.message
    return refused.message


def eventually(condition: Callable[[], object], what: str) -> None:
    """Waits until `condition` holds."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"never happened: {what}")
        time.sleep(0.01)


def assert_serves(served: Served) -> None:
    """Every call has ended, and a good request is answered, over the connection there is and over a new one."""
    eventually(lambda: served.in_flight == 0, "every call ended")
    image = messages.random_digits(0)
    with served.another_connection() as another:
        for stubs in (served, another):
            answer = stubs.vision.Classify(messages.classify(image), timeout=PATIENCE_S)
            np.testing.assert_allclose(messages.probabilities(answer), bundles.classify(image), atol=1e-5)


def wait_for_queue(served: Served, model: str, rows: int) -> None:
    """Waits until so many rows of `model` stand in line."""
    eventually(lambda: served.metric("rafaga_queue_rows", model=model) == rows, f"{rows} rows queued")
