"""One engine at work in a thread of its own: what it computes, until when it may, and what it owes.

A run and the watch over it race for one test-and-set, so that an engine that comes back after it was given up answers
nobody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from rafaga.server.engines.onnxruntime import Engine
from rafaga.server.engines.pipelined import Flight
from rafaga.server.scheduling.batcher import Batch
from rafaga.server.scheduling.job import Arrays, Part


class Relieved(Exception):
    """The engine was given up during this run: its thread owes nothing any more."""


class Run:
    """What an engine computes in this thread, and until when it may. Whoever claims it first, engine or watch, owes the
    answers."""

    __slots__ = ("_unclaimed", "bound_s", "give_up_at", "parts", "thread")

    def __init__(self, parts: Sequence[Part], bound_s: float) -> None:
        self.parts = parts
        self.bound_s = bound_s
        self.give_up_at = time.monotonic() + bound_s
        self.thread = threading.current_thread()
        self._unclaimed = threading.Lock()

    def claim(self) -> bool:
        return self._unclaimed.acquire(blocking=False)


class Shift:
    """One engine at work, in a thread of its own, until it is relieved.

    ahead: a batch that was taken while another still ran; and the flight it is on, once it was sent. on_hung: while
    another thread runs the batch, how to tell its owner that it hangs.
    """

    def __init__(self, engine: Engine, serve: Callable[[Shift], None], name: str) -> None:
        self.engine = engine
        self.thread = threading.Thread(target=serve, args=(self,), name=f"engine-{name}", daemon=True)
        self.batch: Batch | None = None
        self.ahead: Batch | None = None
        self.flight: Flight | Exception | None = None
        self.run: Run | None = None
        self.on_hung: Callable[[], None] | None = None
        self.sound = True  # it has run something since it last failed
        self.relieved = False

    @property
    def owed(self) -> tuple[Batch, ...]:
        """The batches that its engine has taken and not answered."""
        # In this order: what catches up meanwhile is seen twice rather than not at all.
        return tuple(batch for batch in (self.ahead, self.batch) if batch is not None)

    def catch_up(self) -> tuple[Batch, Flight | Exception | None] | None:
        """The batch ahead, if there is one, which is now the one to answer, and its flight."""
        if self.ahead is None:
            return None
        caught_up = self.ahead, self.flight
        self.batch, self.ahead, self.flight = self.ahead, None, None
        return caught_up

    def compute(self, run: Run, outputs: Callable[[], Arrays], expect: Callable[[float], None]) -> Arrays:
        """One run, watched: `expect` is told until when. Raises what the engine raises, or Relieved once nobody waits
        for it any more."""
        self.run = run
        expect(run.give_up_at)
        try:
            arrays = outputs()
            self.sound = True
        finally:
            if not run.claim():
                raise Relieved
            self.run = None
        return arrays
