"""Servers made of asyncio sleeps, for generators that run on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from rafaga.load.generator import CallFailed
from rafaga.load.log import Reply


class FakeServer:
    """Answers after `service_s` as many at once as come. In a stall (begin, end) no answer comes before the end.

    `fails`: the reason with which the n-th call fails, or None.
    """

    def __init__(
        self,
        service_s: float = 0.005,
        stalls: Sequence[tuple[float, float]] = (),
        fails: Callable[[int], str | None] = lambda call: None,
    ) -> None:
        self._service_s = service_s
        self._stalls = stalls
        self._fails = fails
        self._answer = Reply(100, 0, 4900, 4)
        self.calls: list[int] = []
        self.sent_s: list[float] = []
        self.timeouts_s: list[float] = []

    async def __call__(self, request: int, timeout_s: float) -> Reply:
        now = asyncio.get_running_loop().time()
        self.calls.append(request)
        self.sent_s.append(now)
        self.timeouts_s.append(timeout_s)
        reason = self._fails(len(self.calls) - 1)
        done = now + self._service_s
        for begin, end in self._stalls:
            if begin <= done < end:
                done = end
        if done > now + timeout_s:
            await asyncio.sleep(timeout_s)
            raise CallFailed("DEADLINE_EXCEEDED")
        await asyncio.sleep(done - now)
        if reason:
            raise CallFailed(reason)
        return self._answer
