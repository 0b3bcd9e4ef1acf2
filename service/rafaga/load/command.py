"""`rafaga load`: from the command line to an exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from enum import IntEnum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import msgspec
from rich.console import Console

from rafaga.load import document, mlperf, server_metrics, targets, text
from rafaga.load.arguments import OptionsError
from rafaga.load.codecs.base import Target
from rafaga.load.document import SCHEMA, DocumentError, LoadRun, StepResult
from rafaga.load.fleet import Fleet, FleetError
from rafaga.load.options import LoadOptions, Outputs, parse_load, parse_merge
from rafaga.load.payloads import PayloadError
from rafaga.load.schedule import Pattern, Schedule
from rafaga.load.search import search
from rafaga.load.server_metrics import MetricsError
from rafaga.load.session import LoadSession
from rafaga.load.steps import Step
from rafaga.load.trace import TraceError
from rafaga.load.view import View, view
from rafaga.load.worker import Setup

# References are requested one by one before the load; the models may be cold.
_REFERENCE_TIMEOUT_S = 60.0
# Enough callers to keep a batch waiting while one runs.
_PROBE = Step(Pattern.CLOSED, callers=16, warm_up_s=0.5, duration_s=2.0)
# A shorter step may contain no request by chance, and a step without an answer misses every objective.
_LEAST_REQUESTS = 5
# The width of a table in a file: unlimited.
_PLAIN_WIDTH = 200


class LoadExit(IntEnum):
    """A stable interface for scripts. An invalid request and an unreachable server have the exit codes of the other
    commands."""

    OK = 0
    MISSED = 1
    USAGE = 2
    NOTHING_ANSWERED = 3


class LoadError(Exception):
    """An expected failure; the message says what to change. `usage`: whether the command line is wrong."""

    def __init__(self, message: str, *, usage: bool) -> None:
        super().__init__(message)
        self.usage = usage


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs `rafaga load` or `rafaga load merge`. Raises LoadError, RafagaError, OSError."""
    try:
        if arguments[:1] == ["merge"]:
            return _merge(arguments[1:])
        return _load(parse_load(arguments, environ), sys.stderr)
    except (OptionsError, PayloadError, DocumentError, TraceError) as error:
        raise LoadError(str(error), usage=True) from None
    except MetricsError as error:
        raise LoadError(f"--metrics {error}", usage=True) from None
    except (FleetError, mlperf.MlperfError) as error:
        raise LoadError(str(error), usage=False) from None


def _merge(arguments: Sequence[str]) -> int:
    options = parse_merge(arguments)
    merged = document.merge([document.read(path) for path in options.files])
    if options.objective is not None:
        merged = document.judged(merged, options.objective)
    return _finish(merged, options.outputs)


def _load(options: LoadOptions, stderr: TextIO) -> int:
    conditions = options.conditions
    prepared = targets.prepare(
        options.connection,
        conditions.protocol,
        conditions.models,
        options.payloads,
        _REFERENCE_TIMEOUT_S,
        options.trace,
    )
    trace = None
    if options.trace is not None:
        trace = options.trace.schedule(targets.choices(prepared), conditions.seed)
    tls = options.connection.tls
    scrape = partial(server_metrics.scrape, roots=tls.root_certificates if tls else None)
    for url in options.metrics_urls:
        scrape(url)  # a wrong address raises before the load begins
    if options.mlperf is not None:
        return _mlperf(options.mlperf, options, prepared)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    setup = Setup(
        options.connection,
        prepared,
        deadline_s=conditions.deadline_ms / 1e3,
        channels=options.channels,
        check_every=options.check_every,
    )
    with Fleet(setup, options.processes) as fleet, view(stderr, options.outputs.quiet) as shown:
        session = LoadSession(
            fleet,
            targets.models(prepared),
            conditions.objective,
            shown,
            options.part,
            [partial(scrape, url) for url in options.metrics_urls],
        )
        max_rate = None
        if options.find_max:
            max_rate, steps = _find_max(session, options, shown)
        else:
            steps = tuple(_run_all(session, options, trace))
    result = LoadRun(
        SCHEMA,
        version("rafaga"),
        started,
        options.connection.address,
        conditions,
        options.part,
        steps,
        max_rate,
        addresses=options.connection.addresses() if options.metrics_urls else 1,
    )
    return _finish(result, options.outputs)


def _run_all(session: LoadSession, options: LoadOptions, trace: Schedule | None) -> Iterator[StepResult]:
    """One step after the other. With --start-at, each at a time that every machine can compute beforehand."""
    begin_at_s = None
    if options.start_at is not None:
        begin_at_s = time.monotonic() + options.start_at.timestamp() - time.time()
    for step in options.steps:
        if begin_at_s is None:
            yield session.measure(step, trace)
            continue
        begin_at_s += step.warm_up_s
        if begin_at_s < time.monotonic():
            raise OptionsError(f"--start-at: {options.start_at} is over, or too soon to be ready by then")
        yield session.measure(step, trace, begin_at_s)
        # By then the last request of the step has its answer or none.
        begin_at_s += step.duration_s + options.conditions.deadline_ms / 1e3 + 1.0


def _find_max(session: LoadSession, options: LoadOptions, shown: View) -> tuple[float, tuple[StepResult, ...]]:
    """The highest rate that meets the objective, and every step on the way, by rate."""
    first = options.steps[0]
    if not first.rate:
        shown.note("looking for a rate to begin with")
        probed = session.measure(replace(_PROBE, seed=first.seed))
        if not probed.tally.ok:
            return 0.0, (probed,)
        # Half of the rate of waiting callers: a search that begins near its end is short.
        first = replace(first, rate=probed.figures.answered / 2)
    found: list[StepResult] = []
    searching = search(first.rate, options.precision, lowest=_LEAST_REQUESTS / first.duration_s)
    rate = next(searching)
    while True:
        found.append(session.measure(replace(first, rate=rate, seed=first.seed + len(found))))
        figures = found[-1].figures
        try:
            rate = searching.send(bool(figures.met) and not figures.wrong)
        except StopIteration as done:
            return float(done.value), tuple(sorted(found, key=lambda result: result.step.rate))


def _mlperf(plan: mlperf.MlperfPlan, options: LoadOptions, prepared: Sequence[Target]) -> int:
    """A run by LoadGen, with its log and our own count of failures."""
    try:
        import mlperf_loadgen
    except ModuleNotFoundError:
        raise LoadError("--mlperf needs LoadGen: pip install 'rafaga[mlperf]'", usage=False) from None
    endpoint = options.connection.endpoint()
    verdict = mlperf.run(mlperf_loadgen, endpoint, prepared[0], plan, options.channels, options.check_every)
    if options.outputs.json == "-":
        print(msgspec.json.format(msgspec.json.encode(verdict), indent=1).decode())
    else:
        text.show_mlperf(verdict, prepared[0].model, _console())
        if options.outputs.json is not None:
            Path(options.outputs.json).write_bytes(msgspec.json.encode(verdict))
    return LoadExit.OK if verdict.passed else LoadExit.MISSED


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


def _finish(result: LoadRun, outputs: Outputs) -> int:
    """Writes what was asked for, and judges."""
    if outputs.json == "-":
        sys.stdout.write(document.encode(result).decode() + "\n")
    else:
        text.show(result, _console())
        if outputs.json is not None:
            Path(outputs.json).write_bytes(document.encode(result) + b"\n")
    if outputs.report is not None:
        from rafaga.load.report import page  # the plots' library takes a second to import

        outputs.report.write_text(page.render(result), encoding="utf-8")
    if not result.answered:
        return LoadExit.NOTHING_ANSWERED
    return LoadExit.MISSED if result.met is False or result.wrong else LoadExit.OK
