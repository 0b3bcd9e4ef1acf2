"""The command line of `rafaga load` as values, each checked once."""

from __future__ import annotations

import argparse
import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rafaga.load import arguments, mlperf, schedule, trace
from rafaga.load.arguments import OptionsError, each_once, index, not_negative
from rafaga.load.codecs.base import Wire
from rafaga.load.connection import Connection
from rafaga.load.document import Conditions
from rafaga.load.figures import Objective
from rafaga.load.payloads import Payloads, describe
from rafaga.load.schedule import Pattern, SchedulePart, Times
from rafaga.load.steps import Step
from rafaga.load.trace import Trace
from rafaga.options import (
    Parser,
    add_credentials,
    add_server,
    one_of,
    output_file,
    output_or_stdout,
    positive,
    whole,
)

EPILOG = """\
exit codes:
  0  the run is complete, and met the objective where one was given
  1  the objective was missed, an answer was wrong, or the generator failed
  2  the command line, or a file it names, is wrong
  3  the server is unreachable, or answered nothing
  4  the request is invalid: an unknown model, not an image, …
"""
EXAMPLES = (
    "rafaga load --model lenet5-mnist --rate 500 --slo-p99-ms 20",
    "rafaga load --model lenet5-mnist --ramp 100:2000:10 --report ramp.html",
    "rafaga load --model lenet5-mnist --find-max --slo-p99-ms 20",
    "rafaga load --model resnet50 --rows 1=8 --rows 32=1 --rate 20",
    "rafaga load --model resnet50=3 --model lstm-co2=1 --input photos/ --rate 40",
    "rafaga load merge first.json second.json --report both.html",
)

DEFAULT_DURATION_S = 10.0
_OBJECTIVE = "MS[,MODEL=MS...]"


@dataclass(frozen=True)
class Outputs:
    """json: "-" is standard output. quiet: shows no progress."""

    json: str | None = None
    report: Path | None = None
    quiet: bool = False


@dataclass(frozen=True)
class LoadOptions:
    """steps: what to run, in order; for a search only one, with the rate to begin with or 0. trace: arrivals to replay.
    mlperf: what LoadGen runs instead.
    """

    connection: Connection
    conditions: Conditions
    payloads: Payloads
    steps: tuple[Step, ...]
    trace: Trace | None
    find_max: bool
    precision: float
    processes: int
    channels: int
    part: SchedulePart
    start_at: datetime | None
    check_every: int
    metrics_urls: tuple[str, ...]
    outputs: Outputs
    mlperf: mlperf.MlperfPlan | None = None


@dataclass(frozen=True)
class MergeOptions:
    files: tuple[Path, ...]
    objective: Objective | None
    outputs: Outputs


def parse_load(words: Sequence[str], environ: Mapping[str, str]) -> LoadOptions:
    """Raises OptionsError, PayloadError, TraceError or OSError; SystemExit as argparse does it."""
    args = load_parser(environ).parse_args(words)
    payloads = arguments.inputs(args)
    replayed = None if args.trace is None else trace.read(args.trace)
    models = _models(args, replayed)
    objective = args.slo_p99_ms or Objective()
    if unknown := objective.by_model.keys() - models.keys():
        raise OptionsError(f"--slo-p99-ms: no --model {', '.join(sorted(unknown))}")
    if args.find_max and args.slo_p99_ms is None:
        raise OptionsError("--find-max needs an objective: --slo-p99-ms")
    if args.find_max and args.part.of > 1:
        raise OptionsError("--find-max chooses its next step from the last: it cannot be shared with --part")
    return LoadOptions(
        connection=arguments.connection(args.server, args),
        conditions=Conditions(
            protocol=args.protocol,
            models=models,
            payload=describe(payloads),
            deadline_ms=args.deadline_ms,
            seed=args.seed,
            slo_p99_ms=objective.p99_ms,
            slo_p99_ms_by_model=objective.by_model,
        ),
        payloads=payloads,
        steps=() if args.mlperf else _steps(args, replayed),
        trace=replayed,
        find_max=args.find_max,
        precision=args.precision / 100,
        processes=args.processes,
        channels=args.channels,
        part=args.part,
        start_at=args.start_at,
        check_every=args.check_every,
        metrics_urls=each_once("--metrics", args.metrics, str),
        outputs=Outputs(args.json, args.report, args.quiet),
        mlperf=_mlperf_plan(args, payloads, models, objective) if args.mlperf else None,
    )


def parse_merge(words: Sequence[str]) -> MergeOptions:
    parser = Parser(
        prog="rafaga load merge",
        usage="rafaga load merge FILE... [OPTIONS]",
        description="Merges the parts of one run, exactly; with a single file, judges or reports it again.",
    )
    parser.add_argument_group("input").add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="what --json wrote"
    )
    _add_outputs(parser).add_argument(
        "--slo-p99-ms", type=arguments.objective, metavar=_OBJECTIVE, help="judge by this objective instead"
    )
    args = parser.parse_args(words)
    return MergeOptions(tuple(args.files), args.slo_p99_ms, Outputs(args.json, args.report))


def _models(args: Namespace, replayed: Trace | None) -> dict[str, float]:
    """Weights by name: those of --model; without it, those that the trace names."""
    named = [name for name in (replayed.models if replayed else ()) if name is not None]
    if args.model is None:
        if replayed is None or len(named) < len(replayed.models):
            raise OptionsError("no model given: use --model NAME, or a trace that names one in every line")
        return dict.fromkeys(named, 1.0)
    models = each_once("--model", args.model, lambda given: given[0])
    if missing := set(named) - {name for name, _ in models}:
        raise OptionsError(f"--trace names models that are missing from --model: {', '.join(sorted(missing))}")
    return dict(models)


def load_parser(environ: Mapping[str, str]) -> Parser:
    parser = Parser(
        prog="rafaga load",
        description="Load-tests a server. Latency counts from when a request was due, so that it includes every stall.",
        usage="rafaga load --model NAME LOAD [OPTIONS], rafaga load merge FILE...",
        examples=EXAMPLES,
        epilog=EPILOG,
    )
    load = parser.add_argument_group("load, one of")
    which = load.add_mutually_exclusive_group()
    which.add_argument("--rate", type=positive, metavar="R", help="requests per second, sent on schedule (open loop)")
    which.add_argument(
        "--concurrency", type=whole, metavar="C", help="callers that each wait for their answer (closed loop)"
    )
    which.add_argument("--trace", type=Path, metavar="FILE", help="recorded arrivals, by line: SECONDS [MODEL [ROWS]]")
    which.add_argument("--ramp", type=_ramp, metavar="FROM:TO:STEPS", help="rates, one step after the other")
    load.add_argument("--find-max", action="store_true", help="the highest rate that meets --slo-p99-ms")
    load.add_argument(
        "--mlperf",
        type=one_of(mlperf.Scenario),
        choices=list(mlperf.Scenario),
        help="let MLCommons' LoadGen send and judge; --rate: of the server scenario, and a guess for the offline one",
    )
    load.add_argument(
        "--arrivals",
        type=one_of(Pattern),
        choices=[Pattern.POISSON, Pattern.CONSTANT],
        default=Pattern.POISSON,
        help="Poisson arrivals, or evenly spaced (%(default)s)",
    )
    time = parser.add_argument_group("time")
    time.add_argument(
        "--duration", type=positive, metavar="S", help=f"measured seconds of each step ({DEFAULT_DURATION_S:g})"
    )
    time.add_argument("--warm-up", type=not_negative, default=2.0, metavar="S", help="before each step (%(default)s)")
    time.add_argument(
        "--deadline-ms",
        type=positive,
        default=10_000.0,
        metavar="MS",
        help="deadline of a request, from when it is due (10000)",
    )
    time.add_argument(
        "--slo-p99-ms",
        type=arguments.objective,
        metavar=_OBJECTIVE,
        help="p99 target per model, in ms; exit code 1 if missed",
    )
    time.add_argument(
        "--precision",
        type=positive,
        default=5.0,
        metavar="PERCENT",
        help="stop --find-max at this precision (%(default)s)",
    )

    mix = parser.add_argument_group("requests")
    mix.add_argument(
        "--model",
        action="append",
        type=arguments.model,
        metavar="NAME[=WEIGHT]",
        help="several share the requests by weight",
    )
    arguments.add_inputs(mix)
    mix.add_argument(
        "--check-every",
        type=index,
        default=10,
        metavar="N",
        help="compare one answer in N with the one given before the load; 0 compares none (%(default)s)",
    )

    server = parser.add_argument_group("connection")
    add_server(server, environ)
    server.add_argument("--protocol", type=one_of(Wire), choices=list(Wire), default=Wire.RAFAGA, help="(%(default)s)")
    add_credentials(server)
    server.add_argument(
        "--metrics",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="the server's HTTP port, to report what it counted in each step; once per server",
    )

    generator = parser.add_argument_group("generator")
    arguments.add_processes(generator)
    generator.add_argument(
        "--part",
        type=_part,
        default=SchedulePart(),
        metavar="K/N",
        help="share of this machine in a run on N machines",
    )
    generator.add_argument(
        "--start-at", type=_moment, metavar="TIME", help="common start of all parts, ISO 8601: 2026-01-31T12:00:00Z"
    )
    results = _add_outputs(parser)
    results.add_argument("--quiet", action="store_true", help="no progress on standard error")
    results.add_argument(
        "--mlperf-log", type=Path, default=Path("mlperf-log"), metavar="DIR", help="LoadGen's own files (%(default)s)"
    )
    return parser


def _add_outputs(parser: ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("results")
    group.add_argument(
        "--json", type=output_or_stdout, metavar="FILE", help="raw counts and figures; - is standard output"
    )
    group.add_argument("--report", type=output_file(), metavar="FILE.html", help="one page with plots")
    return group


def _steps(args: Namespace, replayed: Trace | None) -> tuple[Step, ...]:
    timed = {"warm_up_s": args.warm_up, "duration_s": args.duration or DEFAULT_DURATION_S}
    if replayed is not None:
        return (_trace_step(args, replayed.due_s),)
    if args.concurrency is not None:
        if args.find_max:
            raise OptionsError("--find-max looks for a rate: use --rate, not --concurrency")
        return (Step(Pattern.CLOSED, callers=args.concurrency, seed=args.seed, **timed),)
    rates: Sequence[float]
    if args.ramp is not None:
        if args.find_max:
            raise OptionsError("--find-max chooses its own rates: leave out --ramp")
        rates = args.ramp
    elif args.rate is not None:
        rates = (args.rate,)
    elif args.find_max:
        rates = (0.0,)
    else:
        raise OptionsError("no load given: use one of --rate, --concurrency, --trace, --ramp, --find-max or --mlperf")
    return tuple(Step(args.arrivals, rate=rate, seed=args.seed + i, **timed) for i, rate in enumerate(rates))


def _mlperf_plan(
    args: Namespace, payloads: Payloads, models: Mapping[str, float], objective: Objective
) -> mlperf.MlperfPlan:
    """Raises OptionsError for options that LoadGen decides itself."""
    for name in ("concurrency", "trace", "ramp", "find_max", "report", "metrics", "start_at"):
        if getattr(args, name):
            raise OptionsError(f"--mlperf leaves the load to LoadGen: leave out --{name.replace('_', '-')}")
    if args.part.of > 1 or args.processes > 1:
        raise OptionsError("--mlperf runs LoadGen in this process: leave out --processes and --part")
    if len(models) > 1:
        raise OptionsError("--mlperf measures one model")
    if len(payloads.rows) > 1 or len(payloads.sizes) > 1:
        raise OptionsError("--mlperf sends every sample as often: leave out all but one --rows and --size")
    if args.rate is None and args.mlperf in (mlperf.Scenario.SERVER, mlperf.Scenario.OFFLINE):
        raise OptionsError(f"--mlperf {args.mlperf} needs --rate, the samples per second to offer or to expect")
    return mlperf.MlperfPlan(
        scenario=args.mlperf,
        rate=args.rate or 1.0,
        duration_s=args.duration or DEFAULT_DURATION_S,
        bound_ms=objective.of(next(iter(models))) or args.deadline_ms,
        deadline_s=args.deadline_ms / 1e3,
        seed=args.seed,
        log=args.mlperf_log,
    )


def _trace_step(args: Namespace, due_s: Times) -> Step:
    """The beginning of the trace is the warm-up. The window ends with the trace, unless --duration ends it earlier."""
    if args.find_max:
        raise OptionsError("--find-max chooses its own rates: leave out --trace")
    length_s = float(due_s[-1]) - args.warm_up
    if length_s <= 0:
        raise OptionsError(f"--trace: nothing is left of {due_s[-1]:g} s after --warm-up {args.warm_up:g}")
    duration_s = min(args.duration or math.inf, length_s + 1e-6)  # so that the last arrival itself is inside
    counted = due_s[(due_s >= args.warm_up) & (due_s < args.warm_up + duration_s)]
    return Step(Pattern.TRACE, len(counted) / duration_s, 0, args.warm_up, duration_s, args.seed)


def _ramp(text: str) -> tuple[float, ...]:
    parts = text.split(":")
    if len(parts) != 3:
        raise ArgumentTypeError(f"{text!r} is not FROM:TO:STEPS, 100:1000:10 for instance")
    return schedule.ramp(positive(parts[0]), positive(parts[1]), whole(parts[2]))


def _part(text: str) -> SchedulePart:
    index, _, of = text.partition("/")
    try:
        return SchedulePart(whole(index) - 1, whole(of))
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r}: {error}") from None


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not an ISO 8601 time") from None
    return moment.astimezone()  # without a zone: local time
