"""A step of a run: one load, held for a while. A ramp has several, a plain run one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rafaga.load import schedule
from rafaga.load.schedule import Pattern, Schedule


@dataclass(frozen=True)
class Step:
    """The load of one step. rate: requests per second, the mean of a trace; 0 for callers in a closed loop. callers: 0
    in an open loop. warm_up_s is sent and not counted, duration_s is counted.
    """

    pattern: Pattern
    rate: float = 0.0
    callers: int = 0
    warm_up_s: float = 0.0
    duration_s: float = 10.0
    seed: int = 0

    @property
    def open(self) -> bool:
        return self.pattern is not Pattern.CLOSED

    def schedule(self, weights: Sequence[float], trace: Schedule | None = None) -> Schedule:
        """The whole of an open loop's schedule, the same in every process and on every machine that shares the run.

        weights: of each request of the mix. trace: from zero on, in place of what would be drawn.
        """
        # Two streams: the requests chosen do not change with the pattern of arrivals.
        arrivals, choices = (np.random.default_rng([self.seed, stream]) for stream in (0, 1))
        begin_s, end_s = -self.warm_up_s, self.duration_s
        match self.pattern:
            case Pattern.POISSON:
                due_s = schedule.poisson(self.rate, begin_s, end_s, arrivals)
            case Pattern.CONSTANT:
                due_s = schedule.constant(self.rate, begin_s, end_s)
            case Pattern.TRACE:
                assert trace is not None, "a trace is replayed from its timestamps"
                # The warm-up of recorded traffic is its own beginning.
                due_s = trace.due_s - self.warm_up_s
                inside = due_s < end_s
                return Schedule(due_s[inside], trace.request[inside])
            case Pattern.CLOSED:
                raise ValueError("callers that wait for answers have no schedule")
        due_s = due_s[due_s < end_s]
        return Schedule(due_s, schedule.mix(weights, len(due_s), choices))
