"""Large models at saturation: served over raw, and int8 over fp32. A part for each model."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench import cores, raw
from bench.blocks import Measure, interleaved, ratios
from bench.cores import Cores, on
from bench.load import Client
from bench.models import LARGE, file
from bench.plan import Part, Plan, Section, Task
from bench.raw import RawModel
from bench.records import Block, Record, Sample, Subject
from bench.servers import TRANSPORTS, serving
from bench.tables import spread, table
from bench.verdicts import Aim, Case, Verdict
from rafaga import bundle as bundles
from rafaga.bundle import Precision

_SERVED, _QUICKER, _LOST = Aim(0.95), Aim(2.5), Aim(0.5, at_least=False)
_RAW, _NATIVE = "raw", "native"
_FP32, _INT8 = Precision.FP32, Precision.INT8
_VNNI = "vnni"  # as a record names its machine
_SUBJECTS = 5
_WINDOW_S, _CLIENT_S = 3.5, 2.0  # beside the window: warming up, and the last answers
_TRY_S, _BUCKETS = 0.5, 6
_START_S = {"vgg16": 45.0}  # three servers load, verify and warm up
_OTHERS_START_S = 15.0
# Callers in a closed loop wait as long as they must: a refusal would only bring the next request.
_PATIENT = ("--max-queue-wait-ms", "30000")


def budget_s(model: str, plan: Plan) -> float:
    find_s = 2 * _BUCKETS * 2 * plan.seconds(_TRY_S)
    return (
        _START_S.get(model, _OTHERS_START_S) + find_s + plan.blocks * _SUBJECTS * (plan.seconds(_WINDOW_S) + _CLIENT_S)
    )


def measure(model: str, task: Task) -> Generator[Block, None, None]:
    plan, place = task.plan, cores.own()
    folder = file(task.repository, model).parent
    with on(place.server):
        alone = {p: raw.load(folder, p, place.threads, plan.seconds(_TRY_S)) for p in (_FP32, _INT8)}
    lost = _lost_points(folder)
    if lost is None:
        task.note(f"`{model}` has random weights here: there is no accuracy for int8 to lose.")
    seconds = plan.seconds(_WINDOW_S)
    measures: dict[Subject, Measure] = {}
    with ExitStack() as stack:
        for precision, transports in ((_FP32, TRANSPORTS), (_INT8, (_NATIVE,))):
            measures[Subject(model, _RAW, precision)] = partial(_raw, alone[precision], place, seconds, lost)
            options = (*_PATIENT, "--precision", precision)
            serve = serving(
                task.repository, (model,), *options, threads=place.threads, cores=place, transports=transports
            )
            for transport, target in stack.enter_context(serve).items():
                client = stack.enter_context(Client(target, model, place))
                callers = max(16, 2 * alone[precision].best_rows)
                measures[Subject(model, transport, precision)] = partial(client.closed, callers, seconds)
        yield from interleaved(measures, plan.blocks)


def _raw(alone: RawModel, place: Cores, seconds: float, lost_points: float | None) -> Sample:
    with on(place.server):
        return Sample(rate=alone.rate(seconds), rows=alone.best_rows, lost_points=lost_points)


def _lost_points(folder: Path) -> float | None:
    """Of int8's accuracy, as the bundle tells. None where the weights are random."""
    bundle = bundles.load(folder)
    int8 = bundle.variant(_INT8)
    trained = bundle.weights.trained and int8 is not None and int8.loss is not None
    return 100 * int8.loss.drop if trained and int8 and int8.loss else None


def tables(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        model = record.part
        base, quick = record.of(model, _RAW, _FP32), record.of(model, _RAW, _INT8)
        rows.append(
            (
                model,
                f"{spread(_rates(base), 1)} in {base[0].rows}",
                *(spread(_served(record, transport, _FP32), 2) for transport in TRANSPORTS),
                f"{spread(_rates(quick), 1)} in {quick[0].rows}",
                spread(_served(record, _NATIVE, _INT8), 2),
                spread(ratios(_rates(quick), _rates(base)), 2),
                spread(_quicker(record), 2),
                "–" if quick[0].lost_points is None else f"{quick[0].lost_points:.1f}",
            )
        )
    head = (
        "",
        "fp32 raw, images/s in batches",
        *(f"{transport} / raw" for transport in TRANSPORTS),
        "int8 raw",
        f"int8 {_NATIVE} / raw",
        "int8 / fp32 raw",
        f"int8 / fp32 {_NATIVE}",
        "points lost",
    )
    return table(head, rows)


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    found = []
    for record in records:
        model = record.part
        cases = tuple(Case.of(t, _SERVED, _served(record, t, _FP32)) for t in TRANSPORTS)
        found.append(Verdict(f"served over raw, {model}", cases, "on {}"))
    for record in records:
        model = record.part
        lost = record.of(model, _RAW, _INT8)[0].lost_points
        beside = ["random weights"] if lost is None else []
        if _VNNI not in record.machine:  # what the aim presupposes
            beside.append("a processor without VNNI")
        case = Case.of("", _QUICKER, _quicker(record))
        found.append(Verdict(f"int8 over fp32, served, {model}", (case,), "{}", ", ".join(beside)))
        if lost is not None:
            found.append(Verdict(f"points that int8 loses, {model}", (Case.of("", _LOST, [lost]),)))
    return found


def _served(record: Record, transport: str, precision: str) -> list[float]:
    return ratios(*(_rates(record.of(record.part, target, precision)) for target in (transport, _RAW)))


def _quicker(record: Record) -> list[float]:
    return ratios(*(_rates(record.of(record.part, _NATIVE, precision)) for precision in (_INT8, _FP32)))


def _rates(samples: Sequence[Sample]) -> list[float]:
    return [sample.rate for sample in samples]


SECTION = Section(
    "large",
    tuple(Part(model, partial(budget_s, model), partial(measure, model)) for model in LARGE),
    tables,
    verdicts,
)
