"""Requests that come at random at 80 % of what a model that gains from batches can do: how long the slowest wait.

perf_analyzer is the client of all: a load generator in Python does not send so much on one core. Server and client have
cores of their own, other than in the closed loops of small models: a client that the server delays sends late, and
perf_analyzer counts latencies from when it sent.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack
from functools import partial

from bench import cores
from bench.blocks import Measure, interleaved, ratios
from bench.models import LENET
from bench.plan import Part, Plan, Section, Task
from bench.records import Block, Record, Sample, Subject
from bench.servers import TRANSPORTS, TRITON, serving
from bench.tables import spread, table
from bench.triton import CLIENT, analyze, backend, closed, peers, poisson
from bench.verdicts import Aim, Case, Verdict

ALONE, PEAK, BUSY = "alone", "peak", "80 %"
_PEAK_CALLERS, _SHARE = 32, 0.8
_QUEUED = Aim(3.0, at_least=False)
_WINDOW_S, _ANALYZER_S = 0.7, 1.0  # perf_analyzer's, and what it takes beside them
_WINDOWS = {ALONE: 3, PEAK: 6, BUSY: 3}
_START_S = 15.0


def budget_s(plan: Plan) -> float:
    seconds = {load: windows * plan.seconds(_WINDOW_S) + _ANALYZER_S for load, windows in _WINDOWS.items()}
    return _START_S + (len(TRANSPORTS) + 1) * (seconds[PEAK] + plan.blocks * sum(seconds.values()))


def measure(task: Task) -> Generator[Block, None, None]:
    """80 % are of the peak that was measured last of that server. Raises RuntimeError without a perf_analyzer."""
    plan, place, scripts = task.plan, cores.own(least=2), peers()
    if scripts is None:
        raise RuntimeError("RAFAGA_PEERS names no folder with perf_analyzer and Triton")
    task.note(f"Here {place}.")
    task.note(CLIENT)
    with ExitStack() as stack:
        serve = serving(task.repository, (LENET,), "--precision", "fp32", threads=1, cores=place, peer=True)
        targets = stack.enter_context(serve)
        if TRITON in targets:
            task.note(backend(targets[TRITON], LENET))
        peaks: dict[str, float] = {}

        def run(server: str, load: Sequence[str]) -> Sample:
            return analyze(scripts, targets[server], LENET, load, plan.seconds(_WINDOW_S), place)

        def peak(server: str) -> Sample:
            sample = run(server, closed(_PEAK_CALLERS))
            peaks[server] = sample.rate
            return sample

        def busy(server: str) -> Sample:
            return run(server, poisson(_SHARE * peaks[server]))

        measures: dict[Subject, Measure] = {}
        for server in targets:
            peak(server)
            measures[Subject(LENET, server, ALONE)] = partial(run, server, closed(1))
            measures[Subject(LENET, server, PEAK)] = partial(peak, server)
            measures[Subject(LENET, server, BUSY)] = partial(busy, server)
        yield from interleaved(measures, plan.blocks)


def tables(records: Sequence[Record]) -> str:
    (record,) = records
    rows = []
    for server in _servers(record):
        alone, peak, busy = (record.of(LENET, server, load) for load in _WINDOWS)
        rows.append(
            (
                server,
                spread([s.rate for s in peak]),
                spread(ratios([s.rate for s in busy], [s.rate for s in peak]), 2),
                spread([s.p50_ms for s in alone], 2),
                spread([s.p50_ms for s in busy], 2),
                spread([s.p99_ms for s in busy], 2),
                spread(_queued(record, server), 1),
                spread([100 * s.late for s in busy], 1),
                spread([s.client_cores for s in busy], 2),
            )
        )
    head = (
        LENET,
        "peak/s",
        "answered at 80 %, over the peak",
        "alone, p50 ms",
        "p50 ms at 80 %",
        "p99 ms at 80 %",
        "p99 / alone",
        "sent late, %",
        "client's cores",
    )
    return table(head, rows)


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    (record,) = records
    own = [server for server in _servers(record) if server != TRITON]
    cases = tuple(Case.of(server, _QUEUED, _queued(record, server)) for server in own)
    beside = f"Triton: {spread(_queued(record, TRITON), 2)}" if TRITON in _servers(record) else ""
    return [Verdict(f"p99 at 80 % of the peak over the latency alone, {LENET}", cases, "on {}", beside)]


def _queued(record: Record, server: str) -> list[float]:
    """The p99 over the p50 of one caller, block by block."""
    busy, alone = (record.of(LENET, server, load) for load in (BUSY, ALONE))
    return ratios([s.p99_ms for s in busy], [s.p50_ms for s in alone])


def _servers(record: Record) -> list[str]:
    """In the order in which they were first measured."""
    return list(dict.fromkeys(subject.target for subject in record.subjects()))


SECTION = Section("tail", (Part("tail", budget_s, measure, (BUSY,)),), tables, verdicts)
