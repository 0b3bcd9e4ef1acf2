"""The two loops. Both live on the event loop's clock, so that a test with a virtual clock runs the real code.

Open: every request is sent when it is due, even if earlier ones have no answer. Closed: a number of callers, each of
which waits for its answer before it sends again. A slow server slows these callers down, which hides its stalls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from rafaga.load.log import NOT_SENT, Log, Reply
from rafaga.load.schedule import Schedule


class CallFailed(Exception):
    """A request that was refused or failed, by the machine-readable reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Send(Protocol):
    """One request of the mix, by its place, to the server and back."""

    async def __call__(self, request: int, timeout_s: float) -> Reply:
        """Raises CallFailed."""


class Caller:
    """Sends single requests and logs their outcomes. start_s: the event loop's time at the window's start. deadline_s
    counts from when the request is due.
    """

    def __init__(self, send: Send, log: Log, start_s: float, deadline_s: float) -> None:
        self._send = send
        self._log = log
        self._start_s = start_s
        self._deadline_s = deadline_s
        self._now_s = asyncio.get_running_loop().time

    @property
    def now_s(self) -> float:
        return self._now_s() - self._start_s

    async def ask(self, request: int, due_s: float) -> None:
        sent_s = self.now_s
        left_s = due_s + self._deadline_s - sent_s
        if left_s <= 0:
            self.give_up(request, due_s)
            return
        try:
            answer = await self._send(request, left_s)
        except CallFailed as failure:
            self._log.failed(request, due_s, sent_s, self.now_s, failure.reason)
        else:
            self._log.answered(request, due_s, sent_s, self.now_s, answer)

    def give_up(self, request: int, due_s: float) -> None:
        now_s = self.now_s
        self._log.failed(request, due_s, now_s, now_s, NOT_SENT)


async def open_loop(caller: Caller, schedule: Schedule, max_outstanding: int) -> None:
    """Returns when every request of the schedule is answered, refused or timed out.

    max_outstanding bounds the generator's memory; requests beyond it are logged as not sent.
    """
    outstanding: set[asyncio.Task[None]] = set()
    for due_s, request in zip(schedule.due_s.tolist(), schedule.request.tolist(), strict=True):
        # Zero when behind the schedule: answers must be read even then.
        await asyncio.sleep(max(0.0, due_s - caller.now_s))
        if len(outstanding) >= max_outstanding:
            caller.give_up(request, due_s)
            continue
        task = asyncio.create_task(caller.ask(request, due_s))
        outstanding.add(task)
        task.add_done_callback(outstanding.discard)
    await asyncio.gather(*outstanding)


async def closed_loop(caller: Caller, callers: int, requests: Sequence[int], end_s: float) -> None:
    """`callers` at once, taking turns in `requests` over and over, until `end_s`."""

    async def call(at: int) -> None:
        while (due_s := caller.now_s) < end_s:
            await caller.ask(requests[at % len(requests)], due_s)
            at += callers

    await asyncio.gather(*map(call, range(callers)))
