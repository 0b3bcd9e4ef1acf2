"""More requests than the machine can answer: how many get an answer in time, how late, and what is done in vain."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from functools import partial

from bench import cores
from bench.blocks import Measure, interleaved
from bench.cores import on
from bench.load import Client
from bench.plan import Part, Plan, Task
from bench.records import Block, Subject
from bench.servers import TRANSPORTS, TRITON, serving
from bench.triton import backend
from rafaga.load.codecs import Wire

MODEL = "googlenet"
_DEADLINE_MS = 500.0
_PEAK_CALLERS = 32
ALONE, PEAK = "alone", "peak"
LOADS = {"0.8×": 0.8, "2×": 2.0, "5×": 5.0}
BUSY, OVER = "0.8×", ("2×", "5×")
_SECONDS = {ALONE: 1.5, PEAK: 4.0, "0.8×": 6.0, "2×": 4.0, "5×": 4.0}
_WARM_UP_S, _REST_S = 1.0, 1.0  # around each window: the rest is watching the server until it computes no more
_START_S = 30.0


def _windows(plan: Plan) -> dict[str, float]:
    """Seconds by load."""
    loads = (ALONE, PEAK, "2×") if plan.quick else tuple(_SECONDS)
    return {load: plan.seconds(_SECONDS[load]) for load in loads}


def budget_s(plan: Plan) -> float:
    """The peer computes what nobody waits for any more before the next window begins."""
    seconds = _windows(plan)
    windows_s = sum(window_s + _WARM_UP_S + _REST_S for window_s in seconds.values())
    backlog_s = sum((LOADS[load] - 1) * (seconds[load] + _WARM_UP_S) for load in OVER if load in seconds)
    return _START_S + plan.blocks * ((len(TRANSPORTS) + 1) * windows_s + backlog_s)


def measure(task: Task) -> Generator[Block, None, None]:
    """Loads are multiples of the peak that a target had at the start; ratios are to the peak of the same block."""
    plan, place = task.plan, cores.own(least=2)
    task.note(f"Here {place}.")
    # The closed loop's callers wait as long as they must; the others' deadlines are shorter than this.
    options = ("--precision", "fp32", "--max-queue-wait-ms", "10000")
    with ExitStack() as stack:
        serve = serving(task.repository, (MODEL,), *options, threads=place.threads, cores=place, peer=True)
        targets = stack.enter_context(serve)
        stack.enter_context(on(place.client))
        if TRITON in targets:
            task.note(backend(targets[TRITON], MODEL))
        measures: dict[Subject, Measure] = {}
        for server, target in targets.items():
            client = Client(target, MODEL, place, wire=Wire.OPEN_INFERENCE, deadline_ms=_DEADLINE_MS)
            stack.enter_context(client)
            peak = client.closed(_PEAK_CALLERS, plan.seconds(_SECONDS[PEAK])).rate
            for load, window_s in _windows(plan).items():
                measures[Subject(MODEL, server, load)] = (
                    partial(client.open, peak * LOADS[load], window_s, _WARM_UP_S)
                    if load in LOADS
                    else partial(client.closed, 1 if load == ALONE else _PEAK_CALLERS, window_s, _WARM_UP_S)
                )
        yield from interleaved(measures, plan.blocks)


PART = Part("overload", budget_s, measure, tuple(LOADS))
