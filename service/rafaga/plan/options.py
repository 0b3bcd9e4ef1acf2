"""The command line of `rafaga plan` as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rafaga.load import arguments as shared
from rafaga.load.arguments import OptionsError, not_negative
from rafaga.load.connection import Connection
from rafaga.load.payloads import Payloads
from rafaga.options import Parser, add_credentials, output_or_stdout, positive

EPILOG = """\
exit codes:
  0  a plan was made, or a profile measured
  1  no number of replicas meets the objective
  2  the command line, or a file it names, is wrong
  3  the server is unreachable
  4  the request is invalid: an unknown model, not an image, …
"""
EXAMPLES = (
    "rafaga plan --measure localhost --model lenet5-mnist --profile lenet5.json",
    "rafaga plan --profile lenet5.json --rate 2000 --slo-p99-ms 20",
)


@dataclass(frozen=True)
class Measuring:
    connection: Connection
    model: str
    payloads: Payloads
    step_s: float
    processes: int
    channels: int


@dataclass(frozen=True)
class PlanGoal:
    """headroom: share by which the rate may grow."""

    rate: float
    slo_p99_ms: float
    headroom: float


@dataclass(frozen=True)
class PlanOptions:
    """profile: written after measuring, otherwise read. json: "-" is standard output."""

    measuring: Measuring | None
    profile: Path | None
    wanted: PlanGoal | None
    seed: int
    json: str | None


def parse(arguments: Sequence[str]) -> PlanOptions:
    """Raises OptionsError, PayloadError or OSError; SystemExit as argparse does it."""
    args = plan_parser().parse_args(arguments)
    if args.measure is None and args.profile is None:
        raise OptionsError("no profile: measure a replica with --measure HOST:PORT, or read one with --profile FILE")
    if (args.measure is None) != (args.model is None):
        raise OptionsError("--measure and --model go together")
    if any(len(given or ()) > 1 for given in (args.rows, args.size)):
        raise OptionsError("a profile needs requests of one kind: one --rows, one --size")
    if (args.rate is None) != (args.slo_p99_ms is None):
        raise OptionsError("--rate and --slo-p99-ms go together")
    if args.rate is None and (args.measure is None or args.profile is None):
        raise OptionsError("nothing to do: --rate and --slo-p99-ms make a plan, --measure and --profile a profile")
    return PlanOptions(
        measuring=None
        if args.measure is None
        else Measuring(
            shared.connection(args.measure, args),
            args.model,
            shared.inputs(args),
            args.step,
            args.processes,
            args.channels,
        ),
        profile=args.profile,
        wanted=None if args.rate is None else PlanGoal(args.rate, args.slo_p99_ms, args.headroom / 100),
        seed=args.seed,
        json=args.json,
    )


def plan_parser() -> Parser:
    parser = Parser(
        prog="rafaga plan",
        description="Calculates how many replicas a rate needs, and their batching settings: from a measured "
        "profile, by simulation with the server's own batcher.",
        usage="rafaga plan [OPTIONS]",
        examples=EXAMPLES,
        epilog=EPILOG,
    )
    plan = parser.add_argument_group("plan")
    plan.add_argument("--rate", type=positive, metavar="R", help="requests per second, all replicas together")
    plan.add_argument("--slo-p99-ms", type=positive, metavar="MS", help="p99 target, in ms")
    plan.add_argument(
        "--headroom",
        type=not_negative,
        default=20.0,
        metavar="PERCENT",
        help="how much the rate may grow before the objective is missed (%(default)g)",
    )
    plan.add_argument("--json", type=output_or_stdout, metavar="FILE", help="the plan as JSON; - is standard output")

    profile = parser.add_argument_group("profile")
    profile.add_argument("--profile", type=Path, metavar="FILE", help="read it, or write it after measuring")
    profile.add_argument("--measure", metavar="HOST[:PORT]", help="measure this replica, with 1 to 64 callers")
    profile.add_argument("--model", metavar="NAME", help="the model to measure")
    profile.add_argument(
        "--step", type=positive, default=3.0, metavar="S", help="seconds for each number of callers (%(default)g)"
    )
    shared.add_inputs(profile)
    add_credentials(profile)
    shared.add_processes(profile)
    return parser
