"""Looks after the engines of one model: finds runs that do not end, and brings up a new engine after one was lost.

the run's bound passes, or the engine is lost  →  its requests fail, health turns  →  wait  →  new engine  →  health

Each in its own time: while one engine is brought up, which may take minutes or never end, the others are watched.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class WatchPolicy:
    """When a run is given up, and how often a new engine is tried.

    timeout_s: no run is given up sooner; nor is one before it took `slowness` times its prediction.
    first_delay_s to max_delay_s: the wait before a new engine, doubled each time, and forgotten once an engine has
    lasted for stable_s. max_stuck: threads of lost engines that may hang at a time; beyond, no new one is made.
    max_failures: times in a row that a device may refuse a new engine before nobody hopes for it any more: an error of
    CUDA's often stays until the process ends. It is tried all the same.
    """

    timeout_s: float = 10.0
    slowness: float = 20.0
    first_delay_s: float = 0.5
    max_delay_s: float = 60.0
    stable_s: float = 300.0
    max_stuck: int = 2
    max_failures: int = 8

    def bound_s(self, predicted_s: float) -> float:
        return max(self.timeout_s, self.slowness * predicted_s)


class Backoff:
    """How long to wait before the next engine. An engine that is lost soon after its start counts like none at all."""

    def __init__(self, policy: WatchPolicy) -> None:
        self._policy = policy
        self._delay_s = policy.first_delay_s
        self._last = -math.inf

    def next(self, now: float) -> float:
        """Seconds to wait from `now` on."""
        if now - self._last > self._policy.stable_s:
            self._delay_s = self._policy.first_delay_s
        delay_s = self._delay_s
        self._delay_s = min(2 * delay_s, self._policy.max_delay_s)
        self._last = now + delay_s
        return delay_s


class Ward(Protocol):
    """Whose engines are watched."""

    @property
    def lacking(self) -> Collection[int]:
        """The numbers of the engines that were lost: others must be brought up."""
        ...

    @property
    def give_up_at(self) -> float:
        """When the first of the runs that go on will have passed its bound, in monotonic seconds; infinity while
        nothing runs."""
        ...

    def give_up(self) -> None:
        """Runs that have passed their bound are taken for hung, and their engines for lost."""
        ...

    def be_patient(self) -> None:
        """The runs get their whole bounds again."""
        ...

    def renew(self, number: int) -> bool:
        """Brings up an engine in the place of a lost one. False when that fails."""
        ...


# A watch that itself woke so much too late saw the whole process stand still: that proves nothing about the engine.
_OVERSLEPT_S = 1.0


class Watch:
    """A thread that sleeps until a run passes its bound. A run that ends before costs a comparison.

    An engine that was lost has a thread of its own until there is a new one.
    """

    def __init__(self, ward: Ward, policy: WatchPolicy, name: str) -> None:
        self._ward = ward
        self._policy = policy
        self._name = name
        self._backoffs: dict[int, Backoff] = {}
        self._renewing: set[int] = set()
        self._changed = threading.Condition(threading.Lock())
        self._wake_at = math.inf
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name=f"watch-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def expect(self, give_up_at: float) -> None:
        """A run begins, and `ward.give_up_at` says so already."""
        if give_up_at < self._wake_at:
            self.wake()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Does not wait: an engine that is being brought up may take its time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _watch(self) -> None:
        while not self._closed:
            for number in self._forsaken():
                self._bring_up(number)
            if (late_s := self._sleep()) is not None:
                if late_s > _OVERSLEPT_S:
                    self._ward.be_patient()
                else:
                    self._ward.give_up()

    def _forsaken(self) -> set[int]:
        """The lost engines that nobody brings up yet."""
        return set(self._ward.lacking) - self._renewing

    def _bring_up(self, number: int) -> None:
        with self._changed:
            self._renewing.add(number)
        try:
            threading.Thread(target=self._renew, args=(number,), name=f"renew-{self._name}", daemon=True).start()
        except RuntimeError:
            _LOG.exception("no thread to bring up an engine: the watch does, and is blind meanwhile")
            self._renew(number)

    def _renew(self, number: int) -> None:
        backoff = self._backoffs.setdefault(number, Backoff(self._policy))
        try:
            while self._rest(backoff.next(time.monotonic())):
                if self._ward.renew(number):
                    break
        finally:
            with self._changed:
                self._renewing.discard(number)
                self._changed.notify_all()

    def _rest(self, seconds: float) -> bool:
        """False when the watch ends meanwhile."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._closed, seconds)

    def _sleep(self) -> float | None:
        """Until a run has passed its bound: gives how long ago. None when there is something else to look at."""
        with self._changed:
            # In this order: a run that begins now either sees that it must wake us, or is seen by us.
            self._wake_at = math.inf
            at = self._wake_at = self._ward.give_up_at
            if self._closed or self._forsaken():
                return None
            now = time.monotonic()
            if now < at:
                self._changed.wait(None if at == math.inf else at - now)
            now = time.monotonic()
            return now - at if self._ward.give_up_at == at <= now else None
