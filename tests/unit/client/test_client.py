"""Clients against a real socket: answers, errors, retries, deadlines, several servers, and TLS."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import subprocess
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from rafaga import AsyncClient, Client, ModelState, RetryPolicy, Tls, errors
from rafaga.priority import Priority
from rafaga.v1 import catalog_pb2, forecasting_pb2, vision_pb2
from tests.blocking import Blocking
from tests.unit.client.conftest import QUICK
from tests.unit.client.fake_server import Script, serving

SEVEN = np.full((28, 28), 7, np.uint8)


def test_classify(client: Client, tmp_path: Path) -> None:
    (tmp_path / "three.png").write_bytes(b"3 = 0x33 = 51, 51 % 10 = 1")
    result = client.classify(SEVEN, model="lenet5-mnist", top_k=3)
    assert (result.top.label, result.top.index, result.top.probability) == ("7", 7, pytest.approx(0.55))
    assert [p.label for p in result.predictions] == ["7", "8", "9"]
    assert (result.model.name, result.model.version, result.model.trained) == ("lenet5-mnist", 1, True)
    assert (result.timing.queue_us, result.timing.batch_size) == (10, 4)
    assert client.classify(tmp_path / "three.png", model="lenet5-mnist").top.label == "1"
    assert repr(result).startswith("Classification({'7': 0.5500, '8': 0.0500")
    assert repr(result.top) == "Prediction('7', index=7, probability=0.5500)"


def test_forecast(client: Client, script: Script) -> None:
    result = client.forecast(list(range(300, 340)), model="lstm-co2", horizon=6)
    assert (result.levels, result.values.shape, result.horizon) == ((0.1, 0.5, 0.9), (3, 6), 6)
    assert result.median.tolist() == [339] * 6
    lower, upper = result.interval(0.8)
    assert (upper - lower).tolist() == [2] * 6
    with pytest.raises(ValueError, match=r"0\.1, 0\.5, 0\.9"):
        result.quantile(0.75)
    with pytest.raises(ValueError):
        result.values[0, 0] = 1.0
    assert client.forecast(np.ones(30), model="lstm-co2").horizon == 24
    assert script.requests[-1] == forecasting_pb2.ForecastRequest(model="lstm-co2", history=[1.0] * 30)


def test_features(client: Client) -> None:
    result = client.features(SEVEN, model="backbone")
    assert [(m.name, m.stride, m.array.shape) for m in result] == [("c4", 16, (2, 3, 3)), ("embedding", 0, (4,))]
    assert (result["c4"].array.dtype, len(result)) == (np.float32, 2)
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
    assert (lenet.labels, lenet.state, lenet.forecast) == (tuple("0123456789"), ModelState.READY, None)
    assert str(lenet.inputs[0]) == "image uint8[?,28,28,1]"
    assert lenet.metrics[0].value == 0.991
    forecast = listed["lstm-co2"].forecast
    assert forecast is not None
    assert (forecast.max_history, forecast.quantile_levels) == (240, (0.1, 0.5, 0.9))
    assert repr(lenet) == "ModelDescription('lenet5-mnist' v1: ready, classification, fp32, top1 0.991)"
    with pytest.raises(errors.ModelNotFound):
        client.model("absent")


def test_errors_of_the_server_are_typed_and_not_retried(either: Any, script: Script) -> None:
    with pytest.raises(errors.ModelNotFound, match="no model 'absent'"):
        either.classify(SEVEN, model="absent")
    with pytest.raises(errors.Unsupported, match="forecaster"):
        either.classify(SEVEN, model="lstm-co2")
    failures = errors.EngineFailure("nan"), errors.DeadlineUnreachable("no time", 0.001), errors.InvalidTensor("28x28")
    for error in failures:
        script.failures.append(error)
        with pytest.raises(type(error), match=error.message):
            either.classify(SEVEN, model="lenet5-mnist")
    assert len(script.requests) == 5


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda c: c.classify(np.zeros((28, 28)), model="lenet5-mnist"), errors.InvalidTensor),
        (lambda c: c.classify("absent.png", model="lenet5-mnist"), FileNotFoundError),
        (lambda c: c.classify_many("one.png", model="lenet5-mnist"), errors.InvalidRequest),
        (lambda c: c.classify(SEVEN, model=""), errors.InvalidRequest),
        (lambda c: c.classify(SEVEN, model="lenet5-mnist", top_k=0), errors.InvalidRequest),
        (lambda c: c.classify(SEVEN, model="lenet5-mnist", min_probability=1.5), errors.InvalidRequest),
        (lambda c: c.forecast([1.0, float("nan")], model="lstm-co2"), errors.InvalidTensor),
        (lambda c: c.forecast([], model="lstm-co2"), errors.InvalidTensor),
        (lambda c: c.forecast(["x"], model="lstm-co2"), errors.InvalidTensor),
        (lambda c: c.forecast([[1.0]], model="lstm-co2"), errors.InvalidTensor),
        (lambda c: c.forecast([1.0], model="lstm-co2", horizon=0), errors.InvalidRequest),
    ],
)
def test_invalid_arguments_never_reach_the_network(
    either: Any, script: Script, call: Callable[[Client], object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        call(either)
    assert not script.requests


def test_refusals_are_tried_again_until_the_attempts_are_used_up(either: Any, script: Script) -> None:
    refusals = [errors.QueueFull("full", retry_after_s=0.001), errors.Draining("stopping")]
    script.failures.extend(refusals)
    assert either.classify(SEVEN, model="lenet5-mnist").top.label == "7"
    assert len(script.requests) == 3
    assert len({request.SerializeToString() for request in script.requests}) == 1
    assert (script.metadata[2]["authorization"], script.metadata[2]["rafaga-priority"]) == ("Bearer secret", "low")
    script.failures.extend([*[errors.QueueFull("before")] * 2, errors.QueueFull("third", 0.5), errors.QueueFull("-")])
    with pytest.raises(errors.QueueFull, match="third") as raised:
        either.classify(SEVEN, model="lenet5-mnist")
    assert raised.value.retry_after_s == 0.5
    assert len(script.requests) == 6


def test_every_call_carries_a_deadline_and_retries_share_it(address: str, script: Script) -> None:
    with Client(address, timeout_s=9, retry=RetryPolicy(initial_backoff_s=0.5, jitter=0)) as client:
        script.failures.append(errors.QueueFull("full"))
        client.models()
        client.models(timeout_s=5)
    first, second, own = script.remaining_s
    assert 0 < second <= first - 0.4 < 9  # on the wire a timeout is rounded up to tenths of a second
    assert 0 < own < 6
    with pytest.raises(ValueError, match="timeout_s"):
        Client(address, timeout_s=0)
    with pytest.raises(ValueError, match="timeout_s"):
        Client(address).models(timeout_s=float("inf"))


def test_a_deadline_that_passes_is_a_typed_error_naming_it(either: Any, script: Script, address: str) -> None:
    script.delay_s = 30
    with pytest.raises(errors.DeadlineExceeded, match=rf"no answer from {address} within 0\.2 s"):
        either.models(timeout_s=0.2)
    assert len(script.requests) == 1


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_unreachable_server_and_a_closed_client(kind: type[Client | AsyncClient]) -> None:
    with asyncio.Runner() as runner:
        client = Blocking(kind("127.0.0.1:1", retry=QUICK), runner)
        said = r"No server at 127\.0\.0\.1:1 \(connection refused\)"
        with pytest.raises(errors.ServerUnreachable, match=said) as raised:
            client.models()
        assert isinstance(raised.value.__cause__, grpc.RpcError)
        client.close()
        with pytest.raises(ValueError, match="closed"):
            client.models()


def test_the_default_server(address: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAFAGA_SERVER", address)
    for client in (Client(retry=QUICK), Client(None, retry=QUICK), Client(address, retry=QUICK)):
        with client:
            assert len(client.models()) == 3
    monkeypatch.setenv("RAFAGA_SERVER", "")
    with Client() as client:
        assert repr(client) == "Client('localhost:50051')"


@pytest.mark.parametrize("priority", Priority)
def test_the_priority_travels_and_messages_over_the_limit_do_not(
    address: str, script: Script, priority: Priority
) -> None:
    with Client(address, priority=priority, max_message_bytes=9000) as client:
        client.models()
        with pytest.raises(errors.RequestTooLarge):
            client.classify(np.zeros((100, 100), np.uint8), model="lenet5-mnist")
    assert [metadata.get("rafaga-priority", "normal") for metadata in script.metadata] == [priority.word]


def test_a_reply_that_does_not_answer_is_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = vision_pb2.ClassifyResponse()
    monkeypatch.setattr("tests.unit.client.fake_server.Servicer.Classify", lambda *_: answer)
    with serving(Script()) as port, Client(f"127.0.0.1:{port}") as client, pytest.raises(errors.InternalError):
        client.classify(SEVEN, model="lenet5-mnist")


def several(stack: ExitStack, *scripts: Script) -> Client:
    """A client that is connected to a server for each script."""
    ports = [stack.enter_context(serving(script)) for script in scripts]
    client = stack.enter_context(Client(",".join(f"127.0.0.1:{port}" for port in ports)))
    # Round robin sets in once all are connected, which the first calls may come before.
    while not all(script.requests for script in scripts):
        client.models()
    return client


def test_a_list_of_servers_is_used_in_turn_and_survives_one_of_them(address: str) -> None:
    scripts = Script(), Script()
    with ExitStack() as stack:
        client = several(stack, *scripts)
        for script in scripts:
            script.requests.clear()
        for _ in range(40):
            client.models()
        assert [len(script.requests) for script in scripts] == [20, 20]
    with Client(f"{address},127.0.0.1:1", retry=QUICK) as client:
        for _ in range(10):
            client.models()


def test_a_replica_whose_model_is_down_costs_no_call() -> None:
    """Of three, which gRPC goes on sending its share: three tries in a row would hit it once in 27 calls."""
    down = Script(failures=deque(errors.ModelNotReady("its engine is down") for _ in range(10_000)))
    with ExitStack() as stack, ThreadPoolExecutor(12) as callers:
        client = several(stack, Script(), Script(), down)
        answers = list(callers.map(lambda _: len(client.models()), range(600)))
    assert answers == [3] * 600


def test_wait_until_ready_waits_for_the_server_and_for_its_models(script: Script) -> None:
    with serving(Script()) as port:
        pass  # a port that was free a moment ago
    script.states["lenet5-mnist"] = catalog_pb2.Model.LOADING
    with Client(f"127.0.0.1:{port}") as client, ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(client.wait_until_ready, 60)
        with serving(script, f"127.0.0.1:{port}"):
            while not (script.requests or waiter.done()):
                time.sleep(0.01)
            assert not waiter.done()
            script.states["lenet5-mnist"] = catalog_pb2.Model.READY
            waiter.result(60)


def test_wait_until_ready_says_why_it_failed(either: Any, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    script.states["lstm-co2"] = catalog_pb2.Model.FAILED
    with pytest.raises(errors.ModelNotReady, match=r"lstm-co2 version 1 failed to load: model\.onnx changed"):
        either.wait_until_ready(30)
    either.wait_until_ready(30, model="lenet5-mnist")
    script.states["lenet5-mnist"] = catalog_pb2.Model.LOADING
    with pytest.raises(errors.ModelNotFound):
        either.wait_until_ready(30, model="absent")
    monkeypatch.setattr("rafaga.client._connection.PATIENT", RetryPolicy(max_attempts=1))
    with pytest.raises(errors.ModelNotReady, match="still loading: lenet5-mnist"):
        either.wait_until_ready(30, model="lenet5-mnist")


def test_both_clients_have_the_same_methods_with_the_same_signatures() -> None:
    def methods(cls: type) -> dict[str, list[inspect.Parameter]]:
        return {
            name: list(inspect.signature(value).parameters.values())
            for name, value in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_") or name == "__init__"
        }

    assert methods(Client) == methods(AsyncClient)


def test_cancelling_the_task_cancels_the_call(address: str, script: Script) -> None:
    """1. A call hangs in the server. 2. Its task is cancelled. 3. The client goes on being usable."""

    async def run() -> None:
        async with AsyncClient(address) as client:
            script.delay_s = 30
            task = asyncio.create_task(client.models())
            while not script.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            script.delay_s = 0
            assert len(await client.models()) == 3

    asyncio.run(run())


def test_tls(script: Script, tmp_path: Path) -> None:
    """A server that asks for certificates; that of localhost is its own authority, for both sides."""
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(chain)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    identity = Tls.from_files(chain, key, chain)
    pairs = [(key.read_bytes(), chain.read_bytes())]
    by_number = dataclasses.replace(identity, server_name="localhost")
    anonymous = Tls(root_certificates=identity.root_certificates)
    with serving(script, credentials=grpc.ssl_server_credentials(pairs, pairs[0][1], True)) as port:
        for host, tls in (("localhost", identity), ("127.0.0.1", by_number)):
            for address in (f"{host}:{port}", f"{host}:{port},{host}:{port}"):
                with Client(address, tls=tls, token="secret") as client:
                    assert len(client.models()) == 3
        for refused in (anonymous, Tls(), None):  # no identity, unknown authority, no TLS at all
            with (
                Client(f"localhost:{port}", tls=refused, retry=QUICK) as client,
                pytest.raises(errors.ServerUnreachable),
            ):
                client.models()
