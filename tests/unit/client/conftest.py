from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from rafaga import AsyncClient, Client, Priority, RetryPolicy
from tests.blocking import Blocking
from tests.unit.client.fake_server import Script, serving

QUICK = RetryPolicy(initial_backoff_s=0.001, max_backoff_s=0.002)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def address(script: Script) -> Iterator[str]:
    with serving(script) as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, retry=QUICK) as client:
        yield client


@pytest.fixture(params=[Client, AsyncClient])
def either(request: pytest.FixtureRequest, address: str) -> Iterator[Any]:
    with asyncio.Runner() as runner:
        client = Blocking(request.param(address, retry=QUICK, token="secret", priority=Priority.LOW), runner)
        yield client
        client.close()
