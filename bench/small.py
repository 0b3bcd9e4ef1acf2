"""Small models: what a request costs beside the model. Closed loops, with Triton and alone."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack
from functools import partial

from bench import cores
from bench.blocks import Measure, interleaved, ratios
from bench.load import Client
from bench.models import LENET, LSTM
from bench.plan import Part, Plan, Section, Task
from bench.records import Block, Record, Subject
from bench.servers import TRANSPORTS, TRITON, serving
from bench.tables import spread, table
from bench.triton import CLIENT, analyze, backend, closed, peers
from bench.verdicts import Aim, Case, Verdict

_AIMS = {1: Aim(1.0), 8: Aim(1.4), 32: Aim(1.6)}
"""Requests per second over Triton's, by callers."""
_ADDED_MS = Aim(0.1, at_least=False)
_MODELS = (LENET, LSTM)
_LONE = "lone"
_WINDOW_S, _WINDOWS, _ANALYZER_S = 0.5, 6, 1.0  # perf_analyzer's: three windows after three of warming up; its start
_LONE_S, _CLIENT_S = 2.0, 1.5
_START_S = 15.0


def _models(plan: Plan) -> Sequence[str]:
    return _MODELS[:1] if plan.quick else _MODELS


def _callers(plan: Plan) -> list[int]:
    return list(_AIMS)[1:2] if plan.quick else list(_AIMS)


def budget_s(plan: Plan) -> float:
    run_s = _WINDOWS * plan.seconds(_WINDOW_S) + _ANALYZER_S
    beside = (len(TRANSPORTS) + 1) * len(_models(plan)) * len(_callers(plan)) * run_s
    alone = len(TRANSPORTS) * (plan.seconds(_LONE_S) + _CLIENT_S)
    return _START_S + plan.blocks * (beside + alone)


def measure(task: Task) -> Generator[Block, None, None]:
    """perf_analyzer, where there is one, as the client of all; then the SDK's protocol, whose replies carry times."""
    plan, place, scripts = task.plan, cores.own(), peers()
    with ExitStack() as stack:
        serve = serving(task.repository, _MODELS, "--precision", "fp32", threads=1, cores=place, peer=True)
        targets = stack.enter_context(serve)
        measures: dict[Subject, Measure] = {}
        if scripts is None:
            task.note("Triton was not at hand: RAFAGA_PEERS names no folder with one.")
        else:
            task.note(backend(targets[TRITON], LENET))
            task.note(CLIENT)
            for model in _models(plan):
                for server, target in targets.items():
                    for callers in _callers(plan):
                        run = partial(analyze, scripts, target, model, closed(callers), plan.seconds(_WINDOW_S), place)
                        measures[Subject(model, server, str(callers))] = run
        for transport in TRANSPORTS:
            client = stack.enter_context(Client(targets[transport], LENET, place))
            measures[Subject(LENET, transport, _LONE)] = partial(client.closed, 1, plan.seconds(_LONE_S))
        yield from interleaved(measures, plan.blocks)


def tables(records: Sequence[Record]) -> str:
    (record,) = records
    return "\n".join([*(_beside(record, model) for model in _MODELS if _measured(record, model)), _alone(record)])


def _beside(record: Record, model: str) -> str:
    rows = []
    for server in (*TRANSPORTS, TRITON):
        for callers in _AIMS:
            samples = record.of(model, server, str(callers))
            rows.append(
                (
                    server,
                    str(callers),
                    spread([s.rate for s in samples]),
                    spread(_over_triton(record, model, server, callers), 2) if server != TRITON else "",
                    spread([s.p50_ms for s in samples], 2),
                    spread([s.p99_ms for s in samples], 2),
                    spread([s.server_cpu_us for s in samples]),
                    spread([s.client_cores for s in samples], 2),
                )
            )
    head = (
        model,
        "callers",
        "requests/s",
        "/ Triton",
        "p50 ms",
        "p99 ms",
        "server's CPU µs / request",
        "client's cores",
    )
    return table(head, rows)


def _alone(record: Record) -> str:
    rows = []
    for transport in TRANSPORTS:
        samples = record.of(LENET, transport, _LONE)
        rows.append(
            (
                transport,
                spread([s.p50_ms for s in samples], 3),
                spread([s.p99_ms for s in samples], 3),
                spread([s.inference_p50_ms for s in samples], 3),
                spread([s.queue_p50_ms for s in samples], 3),
            )
        )
    return table((f"{LENET}, one caller, ms", "p50", "p99", "model's run, p50", "queue, p50: what batching adds"), rows)


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    (record,) = records
    found = [_against_triton(record, model) for model in _MODELS if _measured(record, model)]
    cases = (
        Case.of(transport, _ADDED_MS, [s.queue_p50_ms for s in record.of(LENET, transport, _LONE)])
        for transport in TRANSPORTS
        if record.of(LENET, transport, _LONE)
    )
    return [*found, Verdict(f"what batching adds to a lone request, ms, {LENET}", tuple(cases), "on {}")]


def _against_triton(record: Record, model: str) -> Verdict:
    """Of the transport that is fastest with the most callers; the others stand beside it."""
    measured = [callers for callers in _AIMS if _over_triton(record, model, TRANSPORTS[0], callers)]
    cases = {
        transport: tuple(
            Case.of(str(callers), _AIMS[callers], _over_triton(record, model, transport, callers))
            for callers in measured
        )
        for transport in TRANSPORTS
    }
    fastest = max(TRANSPORTS, key=lambda transport: cases[transport][-1].middle)
    beside = "; ".join(
        f"{transport}: {', '.join(case.shown() for case in cases[transport])}"
        for transport in TRANSPORTS
        if transport != fastest
    )
    return Verdict(f"requests/s over Triton's, {model}, {fastest}", cases[fastest], "at {} callers", beside)


def _measured(record: Record, model: str) -> bool:
    return any(_over_triton(record, model, TRANSPORTS[0], callers) for callers in _AIMS)


def _over_triton(record: Record, model: str, server: str, callers: int) -> list[float]:
    """Block by block; empty without a Triton."""
    rates, base = (record.of(model, target, str(callers)) for target in (server, TRITON))
    return ratios([s.rate for s in rates], [s.rate for s in base]) if base else []


SECTION = Section("small", (Part("small", budget_s, measure),), tables, verdicts)
