"""The asyncio client: what differs from the blocking one, and that nothing else does."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from rafaga import AsyncClient, Client, ServerUnreachable
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
