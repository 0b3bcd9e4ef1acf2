"""Measures a profile of a running server: closed loops with more and more callers, then random arrivals.

Few callers show the cost of a call; many show the cost of large batches and the highest throughput. Random arrivals at
half of that rate show how much calls delay each other; those at higher rates check the simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from rafaga.client import _calls
from rafaga.load import payloads as inputs
from rafaga.load import targets, view
from rafaga.load.codecs.base import Wire
from rafaga.load.connection import Connection
from rafaga.load.figures import MAX_CORES_PER_PROCESS
from rafaga.load.fleet import Fleet
from rafaga.load.log import LogRows
from rafaga.load.payloads import Payloads
from rafaga.load.schedule import Pattern, SchedulePart
from rafaga.load.steps import Step
from rafaga.load.worker import Setup
from rafaga.plan.profile import SCHEMA, MeasuredLoad, Profile, ProfileError, quantiles

CALLERS = (1, 2, 4, 8, 16, 32, 64)
WARM_UP_S = 0.5
# Shares of the highest throughput: one to fit the transport, the other to check the simulation.
SHARED, CHECKED = 0.5, 0.75
_TIMEOUT_S = 60.0
# Batch sizes with fewer runs are ignored: their mean is too noisy.
_ENOUGH_RUNS = 10

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MeasuredAnswers:
    """One step: milliseconds per answer, and the rows of its batch. call_ms: from the send, without queue and engine.
    refused: requests without an answer, for any reason."""

    step: Step
    latency_ms: Floats
    call_ms: Floats
    run_ms: Floats
    batch_rows: Floats
    generator_cores: float
    refused: int = 0

    @property
    def measured(self) -> MeasuredLoad:
        p50_ms, p99_ms = np.percentile(self.latency_ms, (50, 99)).tolist()
        rate = len(self.latency_ms) / self.step.duration_s
        mean_rows = 1 / float(np.mean(1 / self.batch_rows))  # per run, not per request
        step = self.step
        return MeasuredLoad(step.callers, step.rate, rate, p50_ms, p99_ms, mean_rows, self.generator_cores)


def measure(
    connection: Connection,
    model: str,
    payloads: Payloads,
    *,
    step_s: float,
    processes: int,
    channels: int,
    note: Callable[[str], None],
    callers: Sequence[int] = (),
) -> Profile:
    """Loads the server for `step_s` with each number of callers. Raises RafagaError, FleetError or ProfileError. note:
    called with one line per step.
    """
    target = targets.prepare(connection, Wire.RAFAGA, {model: 1.0}, payloads, _TIMEOUT_S)
    with connection.ask(_TIMEOUT_S) as ask:
        call = _calls.model(model, version=0)
        description = _calls.read(call, ask(call.method, call.request))
    found: list[MeasuredAnswers] = []
    with Fleet(Setup(connection, target, channels=channels), processes) as fleet:

        def load(step: Step) -> None:
            found.append(_answers(fleet, step, model))
            measured = found[-1].measured
            note(
                f"{view.describe(step)}: {measured.rate:,.1f} answers/s, p99 {measured.p99_ms:.2f} ms, runs of "
                f"{measured.mean_batch_rows:.1f} rows"
            )

        plain = Step(Pattern.CLOSED, warm_up_s=WARM_UP_S, duration_s=step_s, seed=payloads.seed)
        for count in callers or CALLERS:
            load(replace(plain, callers=count))
            if found[-1].refused and len(found) > 1:
                # More callers than the server admits: refused ones try again at once, and the step would measure
                # refusals.
                note(f"{found.pop().refused:,} of them were refused: more callers add no throughput")
                break
        crowded_rate = found[-1].measured.rate
        for share in (SHARED, CHECKED):
            load(replace(plain, pattern=Pattern.POISSON, rate=share * crowded_rate, duration_s=2 * step_s))
    profile = profile_of(found, request_rows=target[0].requests[0].rows)
    return replace(
        profile,
        rafaga=version("rafaga"),
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        server=connection.address,
        model=model,
        payload=inputs.describe(payloads),
        max_batch_size=description.max_batch_size,
        instances=max(1, description.instances),
        engine=": ".join(filter(None, (description.engine, description.engine_reason))),
    )


def _answers(fleet: Fleet, step: Step, model: str) -> MeasuredAnswers:
    rows: list[LogRows] = []
    uses = fleet.run(step, SchedulePart(), on_begin=lambda at_s: None, on_rows=rows.append, on_tick=lambda: None)
    due_s, sent_s, done_s, queue_us, run_us, batch = (
        np.concatenate([np.frombuffer(getattr(each, name), kind) for each in rows]).astype(np.float64)
        for name, kind in (
            ("due_s", np.float64),
            ("sent_s", np.float64),
            ("done_s", np.float64),
            ("queue_us", np.uint64),
            ("inference_us", np.uint64),
            ("batch_size", np.uint32),
        )
    )
    inside = (due_s >= 0) & (due_s < step.duration_s)
    outcome = np.concatenate([np.frombuffer(each.outcome, np.uint16) for each in rows])
    told = inside & (batch > 0)
    if not told.any():
        raise ProfileError(f"{model}: {view.describe(step)} got no answer in {step.duration_s:g} s")
    run_us = np.maximum(run_us, 1.0)
    return MeasuredAnswers(
        step,
        1e3 * (done_s - due_s)[told],
        np.maximum(1e-3, 1e3 * (done_s - sent_s) - (queue_us + run_us) / 1e3)[told],
        run_us[told] / 1e3,
        batch[told],
        max(use.cores for use in uses),
        int((outcome[inside] != 0).sum()),
    )


def profile_of(found: Sequence[MeasuredAnswers], request_rows: int) -> Profile:
    """The figures of a profile, without its names. found: first the step with one caller; at least one open loop."""
    rows, runs_ms = (np.concatenate([getattr(each, name) for each in found]) for name in ("batch_rows", "run_ms"))
    # Every answer of a batch reports the same run.
    weights = request_rows / rows
    knots, means_ms = _run_table(rows, runs_ms, weights)
    alone = found[0].call_ms
    crowded = max((each for each in found if not each.step.open), key=lambda each: each.step.callers)
    shared = next(each for each in found if each.step.open)
    steps = tuple(each.measured for each in found)
    busy = [m for m in steps if m.generator_cores > MAX_CORES_PER_PROCESS]
    return Profile(
        schema=SCHEMA,
        rafaga="",
        measured="",
        server="",
        model="",
        payload="",
        request_rows=request_rows,
        max_batch_size=knots[-1],
        batch_rows=knots,
        run_ms=means_ms,
        run_spread=quantiles(runs_ms / np.interp(rows, knots, means_ms), weights),
        call_ms=float(alone.mean()),
        call_spread=quantiles(alone / alone.mean()),
        shared_rate=shared.measured.rate,
        shared_call_ms=float(shared.call_ms.mean()),
        crowded_rate=crowded.measured.rate,
        steps=steps,
        warnings=tuple(
            f"a generator process used {m.generator_cores:.0%} of a core at {m.rate:,.0f} answers/s: measure with more "
            "--processes, otherwise the plan has more replicas than needed"
            for m in busy
        ),
    )


def _run_table(rows: Floats, runs_ms: Floats, weights: Floats) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Mean duration by rows: the piecewise linear fit to all runs, with knots at powers of two and at the largest size.
    It never falls with the size."""
    sizes, which = np.unique(rows, return_inverse=True)
    runs = np.bincount(which, weights)
    means_ms = np.bincount(which, weights * runs_ms) / runs
    often = runs >= min(_ENOUGH_RUNS, runs.max())
    smallest, largest = int(sizes[often][0]), int(sizes[often][-1])
    inner = [
        knot
        for knot in (1 << k for k in range(largest.bit_length()))
        if smallest < knot < largest and runs[(sizes > knot / 2**0.5) & (sizes < knot * 2**0.5)].sum() >= _ENOUGH_RUNS
    ]
    knots = np.unique([smallest, *inner, largest]).astype(float)
    hats = np.stack([np.interp(sizes, knots, np.eye(len(knots))[k]) for k in range(len(knots))], axis=1)
    root = np.sqrt(runs)[:, np.newaxis]
    fitted, *_ = np.linalg.lstsq(hats * root, means_ms * root[:, 0], rcond=None)
    rising = np.maximum.accumulate(np.maximum(fitted, 1e-3))
    return tuple(knots.astype(int).tolist()), tuple(rising.tolist())
