"""The asyncio client: what differs from the blocking one, and that nothing else does."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rafaga import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    InvalidTensor,
    ModelNotFound,
    QueueFull,
    ServerUnreachable,
)
from tests.unit.client.conftest import QUICK
from tests.unit.client.fake_server import Script


def test_both_clients_have_the_same_methods_with_the_same_signatures() -> None:
    def methods(cls: type) -> dict[str, list[inspect.Parameter]]:
        return {
            name: list(inspect.signature(value).parameters.values())
            for name, value in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_") or name == "__init__"
        }

    assert methods(Client) == methods(AsyncClient)


def test_many_calls_at_once(address: str, script: Script, tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(b"\x01")
    images = [np.full((4, 4), i % 10, np.uint8) for i in range(100)]

    async def run() -> None:
        async with AsyncClient(address) as client:
            await client.wait_until_ready(30)
            answers = await asyncio.gather(*(client.classify(i, model="lenet5-mnist") for i in images))
            assert [a.top.index for a in answers] == [i % 10 for i in range(100)]
            batch = await client.classify_many([path, b"\x02", Image.new("L", (2, 2))], model="lenet5-mnist")
            assert [a.top.index for a in batch][:2] == [1, 2]
            assert (await client.classify_many(np.stack(images)[..., None], model="lenet5-mnist"))[9].top.index == 9
            assert (await client.forecast(np.ones(30), model="lstm-co2", horizon=3)).horizon == 3
            assert (await client.features(images[0], model="backbone"))["c4"].array.shape == (2, 3, 3)
            maps = await client.features_many(images[:2], model="backbone")
            assert [each["c4"].array.shape for each in maps] == [(2, 3, 3)] * 2
            assert len(await client.models()) == 3
            assert (await client.model("lenet5-mnist")).labels == tuple("0123456789")

    asyncio.run(run())


def test_errors_and_retries_are_those_of_the_core(address: str, script: Script) -> None:
    async def run() -> None:
        async with AsyncClient(address, retry=QUICK, token="secret") as client:
            script.failures.extend([QueueFull("full", retry_after_s=0.001), Draining("stopping")])
            assert (await client.classify(b"\x07", model="lenet5-mnist")).top.label == "7"
            assert len(script.requests) == 3
            assert script.metadata[0]["authorization"] == "Bearer secret"
            with pytest.raises(ModelNotFound):
                await client.classify(b"\x07", model="absent")
            with pytest.raises(InvalidTensor):
                await client.classify(np.zeros((4, 4)), model="lenet5-mnist")  # type: ignore[arg-type]
            with pytest.raises(InvalidRequest):
                await client.classify_many("one.png", model="lenet5-mnist")
            with pytest.raises(FileNotFoundError):
                await client.classify("absent.png", model="lenet5-mnist")
            script.delay_s = 30
            with pytest.raises(DeadlineExceeded, match="no answer from"):
                await client.models(timeout_s=0.2)

    asyncio.run(run())


def test_nobody_listening_and_a_closed_client() -> None:
    async def run() -> None:
        client = AsyncClient("127.0.0.1:1", retry=QUICK)
        with pytest.raises(ServerUnreachable):
            await client.models()
        await client.close()
        with pytest.raises(ValueError, match="closed"):
            await client.models()

    asyncio.run(run())


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
