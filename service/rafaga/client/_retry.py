"""Decides when a failed call is tried again; the clients sleep and send.

Every call of the API reads and changes nothing, so a call can be repeated after a lost connection as well as after a
refusal. Errors that would only occur again are not retried: an invalid request, a missing model, a deadline that has
passed or cannot be met (a later try would have even less time).

A replica that is stopping, or whose model is down, refuses all calls, and gRPC keeps sending it its share. With three
replicas, one call in 27 would hit it three times in a row, so these refusals do not count as
tries: the call moves on at once. From stopping replicas it moves on until its deadline; if a model is down on all
replicas, it gives up after twelve moves.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from rafaga.errors import DeadlineUnreachable, Draining, ModelNotReady, RafagaError, Refused, ServerUnreachable

# First pause in seconds, growth factor, longest pause in seconds.
_MOVE_BACKOFF = (0.01, 2.0, 0.2)
# From replicas whose model is down: 1.5 s in total. Hitting a single one that often in a row is very unlikely.
_MAX_MOVES = 12


@dataclass(frozen=True)
class RetryPolicy:
    """How often a call is retried, and with which pauses. The deadline of a call spans all its tries.

    The n-th pause is initial_backoff_s * multiplier**(n-1), at most max_backoff_s, spread by ±jitter (a fraction).
    If the server said when to retry, that is the pause instead, and jitter only lengthens it. Refusals by servers that
    are stopping, or whose model is down, do not count: see `move_on_s`.

    >>> client = Client("localhost:50051", retry=RetryPolicy(max_attempts=5, max_backoff_s=1.0))  # doctest: +SKIP
    """

    max_attempts: int = 3  # the first one included; 1 means no retries
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    multiplier: float = 2.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        if self.initial_backoff_s < 0 or self.max_backoff_s < self.initial_backoff_s:
            raise ValueError("expected 0 <= initial_backoff_s <= max_backoff_s")
        if not 1 <= self.multiplier <= 10:
            raise ValueError(f"multiplier must be from 1 to 10, got {self.multiplier}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be from 0 to 1, got {self.jitter}")

    def pause_s(self, error: RafagaError, attempt: int, remaining_s: float, chance: float) -> float | None:
        """Seconds to wait after `attempt` (1, 2, …) failed with `error`; None: do not try again.

        `remaining_s` is the time left until the deadline, `chance` a random number in [0, 1).
        """
        if attempt >= self.max_attempts or not is_retryable(error):
            return None
        if isinstance(error, Refused) and error.retry_after_s is not None:
            pause_s = error.retry_after_s * (1 + self.jitter * chance)
        else:
            backoff_s = _growing(attempt, self.initial_backoff_s, self.multiplier, self.max_backoff_s)
            pause_s = self._spread(backoff_s, chance)
        return pause_s if pause_s < remaining_s else None

    def move_on_s(self, moves: int, remaining_s: float, chance: float) -> float | None:
        """Seconds to wait after the `moves`-th (1, 2, …) refusal by a server that cannot answer at present: first zero,
        because another replica may answer, then growing, because there may be no other."""
        if self.max_attempts == 1:
            return None
        pause_s = 0.0 if moves == 1 else self._spread(_growing(moves - 1, *_MOVE_BACKOFF), chance)
        return pause_s if pause_s < remaining_s else None

    def _spread(self, pause_s: float, chance: float) -> float:
        return pause_s * (1 + self.jitter * (2 * chance - 1))


def _growing(n: int, initial_s: float, multiplier: float, most_s: float) -> float:
    # The exponent is bounded because a long wait can reach thousands of tries, where a float overflows.
    return min(initial_s * multiplier ** min(n - 1, 64), most_s)


# To wait until a server is up: tries until the deadline.
PATIENT = RetryPolicy(max_attempts=sys.maxsize, initial_backoff_s=0.05, max_backoff_s=0.5)


def is_retryable(error: RafagaError) -> bool:
    return isinstance(error, Refused | ServerUnreachable) and not isinstance(error, DeadlineUnreachable)


class Attempts:
    """The tries of one call against its deadline."""

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._chance = chance
        self._deadline = clock() + timeout_s
        self._failed = 0
        self._moved = 0

    @property
    def remaining_s(self) -> float:
        """Time limit of the next try; never negative, so that gRPC itself reports a passed deadline."""
        return max(0.0, self._deadline - self._clock())

    def pause_s(self, error: RafagaError) -> float | None:
        """Seconds until the next try, after one failed with `error`; None for no further try."""
        elsewhere = isinstance(error, Draining) or (isinstance(error, ModelNotReady) and self._moved < _MAX_MOVES)
        if elsewhere and isinstance(error, Refused) and error.retry_after_s is None:
            self._moved += 1
            return self._policy.move_on_s(self._moved, self.remaining_s, self._chance())
        self._failed += 1
        return self._policy.pause_s(error, self._failed, self.remaining_s, self._chance())
