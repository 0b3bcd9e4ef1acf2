"""The blocking client against a real socket."""

from __future__ import annotations

import dataclasses
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest

from rafaga import (
    Client,
    DeadlineExceeded,
    DeadlineUnreachable,
    Draining,
    EngineFailure,
    InvalidRequest,
    InvalidTensor,
    ModelNotFound,
    ModelNotReady,
    ModelState,
    QueueFull,
    RequestTooLarge,
    RetryPolicy,
    ServerUnreachable,
    Tls,
    Unsupported,
    errors,
)
from rafaga.priority import Priority
from rafaga.v1 import catalog_pb2, forecasting_pb2, vision_pb2
from tests.unit.client.conftest import QUICK
from tests.unit.client.fake_server import Script, serving

SEVEN = np.full((28, 28), 7, np.uint8)


def test_classify(client: Client, script: Script, tmp_path: Path) -> None:
    (tmp_path / "three.png").write_bytes(b"3 = 0x33 = 51, 51 % 10 = 1")
    result = client.classify(SEVEN, model="lenet5-mnist", top_k=3)
    assert result.top.label == "7"
    assert result.top.index == 7
    assert result.top.probability == pytest.approx(0.55)
    assert [p.label for p in result.predictions] == ["7", "8", "9"]
    assert (result.model.name, result.model.version, result.model.trained) == ("lenet5-mnist", 1, True)
    assert (result.timing.queue_us, result.timing.batch_size) == (10, 4)
    assert client.classify(tmp_path / "three.png", model="lenet5-mnist").top.label == "1"
    assert repr(result).startswith("Classification({'7': 0.5500, '8': 0.0500")
    assert repr(result.top) == "Prediction('7', index=7, probability=0.5500)"


def test_forecast(client: Client, script: Script) -> None:
    result = client.forecast(list(range(300, 340)), model="lstm-co2", horizon=6)
    assert result.levels == (0.1, 0.5, 0.9)
    assert result.values.shape == (3, 6)
    assert result.horizon == 6
    np.testing.assert_array_equal(result.median, np.full(6, 339, np.float32))
    lower, upper = result.interval(0.8)
    np.testing.assert_array_equal(upper - lower, np.full(6, 2, np.float32))
    with pytest.raises(ValueError, match=r"0\.1, 0\.5, 0\.9"):
        result.quantile(0.75)
    with pytest.raises(ValueError):
        result.values[0, 0] = 1.0
    assert client.forecast(np.ones(30), model="lstm-co2").horizon == 24
    assert script.requests[-1] == forecasting_pb2.ForecastRequest(model="lstm-co2", history=[1.0] * 30)


def test_features(client: Client) -> None:
    result = client.features(SEVEN, model="backbone")
    assert [(m.name, m.stride, m.array.shape) for m in result] == [("c4", 16, (2, 3, 3)), ("embedding", 0, (4,))]
    assert result["c4"].array.dtype == np.float32
    assert len(result) == 2
    assert "UNTRAINED" in repr(result)
    with pytest.raises(KeyError, match="c4, embedding"):
        result["c5"]
    first, second = client.features_many([SEVEN, SEVEN], model="backbone")
    assert first["c4"].array.shape == (2, 3, 3)
    assert second["embedding"].array.tolist() == [4, 5, 6, 7]


def test_models_and_model(client: Client) -> None:
    listed = {m.name: m for m in client.models()}
    assert set(listed) == {"backbone", "lenet5-mnist", "lstm-co2"}
    lenet = client.model("lenet5-mnist")
    assert lenet.labels == tuple("0123456789")
    assert lenet.state is ModelState.READY
    assert str(lenet.inputs[0]) == "image uint8[?,28,28,1]"
    assert lenet.metrics[0].value == 0.991
    assert lenet.forecast is None
    forecast = listed["lstm-co2"].forecast
    assert forecast is not None
    assert (forecast.max_history, forecast.quantile_levels) == (240, (0.1, 0.5, 0.9))
    assert repr(lenet) == "ModelDescription('lenet5-mnist' v1: ready, classification, fp32, top1 0.991)"
    with pytest.raises(ModelNotFound):
        client.model("absent")


def test_errors_of_the_server_are_typed_and_not_retried(client: Client, script: Script) -> None:
    with pytest.raises(ModelNotFound, match="no model 'absent'"):
        client.classify(SEVEN, model="absent")
    with pytest.raises(Unsupported, match="forecaster"):
        client.classify(SEVEN, model="lstm-co2")
    for error in (EngineFailure("nan"), DeadlineUnreachable("no time", 0.001), InvalidTensor("28x28 please")):
        script.failures.append(error)
        with pytest.raises(type(error), match=error.message):
            client.classify(SEVEN, model="lenet5-mnist")
    assert len(script.requests) == 5


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.classify(np.zeros((28, 28)), model="lenet5-mnist"),
        lambda c: c.classify(SEVEN, model=""),
        lambda c: c.classify(SEVEN, model="lenet5-mnist", top_k=0),
        lambda c: c.classify(SEVEN, model="lenet5-mnist", min_probability=1.5),
        lambda c: c.forecast([1.0, float("nan")], model="lstm-co2"),
        lambda c: c.forecast([], model="lstm-co2"),
        lambda c: c.forecast(["x"], model="lstm-co2"),
        lambda c: c.forecast([[1.0]], model="lstm-co2"),
        lambda c: c.forecast([1.0], model="lstm-co2", horizon=0),
    ],
)
def test_invalid_arguments_never_reach_the_network(
    client: Client, script: Script, call: Callable[[Client], object]
) -> None:
    with pytest.raises(InvalidRequest):
        call(client)
    assert not script.requests


def test_refusals_are_tried_again(client: Client, script: Script) -> None:
    script.failures.extend([QueueFull("full", retry_after_s=0.001), Draining("stopping")])
    assert client.classify(SEVEN, model="lenet5-mnist").top.label == "7"
    assert len(script.requests) == 3
    assert len({request.SerializeToString() for request in script.requests}) == 1


def test_the_last_refusal_is_raised_when_the_attempts_are_used_up(client: Client, script: Script) -> None:
    script.failures.extend(
        [QueueFull("first"), QueueFull("second"), QueueFull("third", retry_after_s=0.5), QueueFull("-")]
    )
    with pytest.raises(QueueFull, match="third") as raised:
        client.classify(SEVEN, model="lenet5-mnist")
    assert raised.value.retry_after_s == 0.5
    assert len(script.requests) == 3


def test_every_call_carries_a_deadline_and_retries_share_it(address: str, script: Script) -> None:
    with Client(address, timeout_s=9, retry=RetryPolicy(initial_backoff_s=0.5, jitter=0)) as client:
        script.failures.append(QueueFull("full"))
        client.models()
        client.models(timeout_s=5)
    first, second, own = script.remaining_s
    assert 0 < second <= first - 0.4 < 9  # on the wire a timeout is rounded up to tenths of a second
    assert 0 < own < 6
    with pytest.raises(ValueError, match="timeout_s"):
        Client(address, timeout_s=0)
    with pytest.raises(ValueError, match="timeout_s"):
        Client(address).models(timeout_s=float("inf"))


def test_a_deadline_that_passes_is_a_typed_error_naming_it(client: Client, script: Script, address: str) -> None:
    script.delay_s = 30
    with pytest.raises(DeadlineExceeded, match=rf"no answer from {address} within 0\.2 s"):
        client.models(timeout_s=0.2)
    assert len(script.requests) == 1


def test_an_unreachable_server() -> None:
    with (
        Client("127.0.0.1:1", retry=QUICK) as client,
        pytest.raises(ServerUnreachable, match=r"No server at 127\.0\.0\.1:1 \(connection refused\)") as raised,
    ):
        client.models()
    assert isinstance(raised.value.__cause__, grpc.RpcError)


def test_the_default_server(address: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAFAGA_SERVER", address)
    for client in (Client(retry=QUICK), Client(None, retry=QUICK), Client(address, retry=QUICK)):
        with client:
            assert len(client.models()) == 3
    monkeypatch.setenv("RAFAGA_SERVER", "")
    with Client() as client:
        assert repr(client) == "Client('localhost:50051')"


def test_messages_over_the_limit_are_not_sent(address: str, script: Script) -> None:
    with Client(address, max_message_bytes=1000) as client, pytest.raises(RequestTooLarge):
        client.classify(np.zeros((100, 100), np.uint8), model="lenet5-mnist")
    assert not script.requests


@pytest.mark.parametrize("priority", Priority)
def test_the_priority_travels(address: str, script: Script, priority: Priority) -> None:
    with Client(address, token="secret", priority=priority) as client:
        client.models()
    assert script.metadata[0].get("rafaga-priority", "normal") == priority.word
    assert script.metadata[0]["authorization"] == "Bearer secret"


def test_a_reply_that_does_not_answer_is_an_internal_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.unit.client.fake_server.Vision.Classify", lambda *_: vision_pb2.ClassifyResponse(results=[])
    )
    with serving(Script()) as port, Client(f"127.0.0.1:{port}") as client, pytest.raises(errors.InternalError):
        client.classify(SEVEN, model="lenet5-mnist")


def test_a_list_of_servers_is_used_in_turn_and_survives_one_of_them() -> None:
    scripts = Script(), Script()
    with (
        serving(scripts[0]) as first,
        serving(scripts[1]) as second,
        Client(f"127.0.0.1:{first},127.0.0.1:{second}", retry=QUICK) as client,
    ):
        # Round robin sets in once both are connected, which the first calls may come before.
        while not all(script.requests for script in scripts):
            client.models()
        for script in scripts:
            script.requests.clear()
        for _ in range(40):
            client.models()
        assert [len(script.requests) for script in scripts] == [20, 20]
    with serving(scripts[0]) as first, Client(f"127.0.0.1:{first},127.0.0.1:1", retry=QUICK) as client:
        for _ in range(10):
            client.models()


def test_a_replica_whose_model_is_down_costs_no_call() -> None:
    """Of three, which gRPC goes on sending its share: three tries in a row would hit it once in 27 calls."""
    scripts = Script(), Script(), Script(failures=deque(ModelNotReady("its engine is down") for _ in range(10_000)))
    with ExitStack() as stack:
        ports = [stack.enter_context(serving(script)) for script in scripts]
        client = stack.enter_context(Client(",".join(f"127.0.0.1:{port}" for port in ports)))
        while not all(script.requests for script in scripts):
            client.models()
        with ThreadPoolExecutor(12) as callers:
            answers = list(callers.map(lambda _: len(client.models()), range(600)))
    assert answers == [3] * 600


def test_wait_until_ready_waits_for_the_server_and_for_its_models(script: Script) -> None:
    with serving(Script()) as port:
        pass  # a port that was free a moment ago
    script.states["lenet5-mnist"] = catalog_pb2.Model.LOADING
    outcome: list[BaseException | None] = []

    def wait() -> None:
        with Client(f"127.0.0.1:{port}") as client:
            try:
                client.wait_until_ready(60)
                outcome.append(None)
            except errors.RafagaError as error:
                outcome.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    with serving(script, f"127.0.0.1:{port}"):
        while not script.requests:  # the client has found the server
            waiter.join(0.01)
        assert not outcome
        script.states["lenet5-mnist"] = catalog_pb2.Model.READY
        waiter.join(60)
    assert outcome == [None]


def test_wait_until_ready_says_why_it_failed(client: Client, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    script.states["lstm-co2"] = catalog_pb2.Model.FAILED
    with pytest.raises(ModelNotReady, match=r"lstm-co2 version 1 failed to load: model\.onnx changed"):
        client.wait_until_ready(30)
    client.wait_until_ready(30, model="lenet5-mnist")
    script.states["lenet5-mnist"] = catalog_pb2.Model.LOADING
    with pytest.raises(ModelNotFound):
        client.wait_until_ready(30, model="absent")
    monkeypatch.setattr("rafaga.client._connection.PATIENT", RetryPolicy(max_attempts=1))
    with pytest.raises(ModelNotReady, match="still loading: lenet5-mnist"):
        client.wait_until_ready(30, model="lenet5-mnist")


@pytest.fixture
def identity(tmp_path: Path) -> Tls:
    """A certificate of localhost that is its own authority, for both sides."""
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(chain)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return Tls.from_files(chain, key, chain)


@pytest.fixture
def secured(script: Script, identity: Tls) -> Iterator[int]:
    """The port of a server that asks for certificates."""
    assert identity.private_key
    assert identity.certificate_chain
    pair = [(identity.private_key, identity.certificate_chain)]
    credentials = grpc.ssl_server_credentials(pair, identity.certificate_chain, require_client_auth=True)
    with serving(script, "127.0.0.1:0", credentials) as port:
        yield port


def test_tls(secured: int, identity: Tls) -> None:
    for address in (f"localhost:{secured}", f"localhost:{secured},localhost:{secured}"):
        with Client(address, tls=identity, token="secret") as client:
            assert len(client.models()) == 3
    by_number = dataclasses.replace(identity, server_name="localhost")
    for address in (f"127.0.0.1:{secured}", f"127.0.0.1:{secured},127.0.0.1:{secured}"):
        with Client(address, tls=by_number) as client:
            assert len(client.models()) == 3
    anonymous = Tls(root_certificates=identity.root_certificates)
    for tls in (anonymous, Tls(), None):  # no identity, unknown authority, no TLS at all
        with Client(f"localhost:{secured}", tls=tls, retry=QUICK) as client, pytest.raises(ServerUnreachable):
            client.models()
