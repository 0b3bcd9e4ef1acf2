"""Both clients of the SDK, for tests that ask the same of each."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from rafaga import AsyncClient, Client


class Blocking:
    """Either client; what the asyncio one returns is awaited."""

    def __init__(self, client: Client | AsyncClient, runner: asyncio.Runner) -> None:
        self._client, self._runner = client, runner

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            answer = getattr(self._client, name)(*arguments, **options)
            return self._runner.run(answer) if inspect.iscoroutine(answer) else answer

        return call
