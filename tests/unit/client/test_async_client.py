"""The asyncio client: what differs from the blocking one, and that nothing else does."""

from __future__ import annotations

import asyncio
import inspect

import numpy as np
import pytest

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


def test_an_unreachable_server_and_a_closed_client() -> None:
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
