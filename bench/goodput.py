"""What overload did: answers in time over the peak, their latencies, work in vain, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from bench.blocks import ratios
from bench.memory import LIMIT_BYTES, MIB, growth_bytes
from bench.overload import ALONE, BUSY, LOADS, MODEL, OVER, PART, PEAK
from bench.plan import Section
from bench.records import Record, Sample
from bench.servers import TRANSPORTS, TRITON
from bench.tables import spread, table
from bench.verdicts import Aim, Case, Verdict

_IN_TIME = {"2×": Aim(0.95), "5×": Aim(0.9)}
_LATER, _QUEUED = Aim(1.5, at_least=False), Aim(3.0, at_least=False)
_WASTED = Aim(0.01, at_least=False)
_GROWTH_MIB = Aim(LIMIT_BYTES / MIB, at_least=False)

Pooled: TypeAlias = tuple[float, list[float]]
"""The figure of all blocks' raw values together, and those of each block."""


def tables(records: Sequence[Record]) -> str:
    (record,) = records
    return "\n".join([_answers(record), _costs(record)])


def _answers(record: Record) -> str:
    rows = [
        (
            server,
            spread([s.rate for s in record.of(MODEL, server, PEAK)], 1),
            *(spread(_in_time(record, server, load), 2) for load in LOADS),
            spread([s.p50_ms for s in record.of(MODEL, server, ALONE)], 1),
            *(_p99(record.of(MODEL, server, load)) for load in LOADS),
        )
        for server in _servers(record)
    ]
    in_time = (f"in time at {load}, over the peak" for load in LOADS)
    head = ("", "peak/s", *in_time, "alone, p50 ms", *(f"p99 ms at {load}" for load in LOADS))
    return table(head, rows)


def _costs(record: Record) -> str:
    rows = [
        (
            server,
            *(_percent(record.of(MODEL, server, load)) for load in LOADS),
            *(spread([s.server_cpu_us / 1e3 for s in record.of(MODEL, server, load)], 1) for load in LOADS),
            f"{max(s.client_cores for load in _over(record) for s in record.of(MODEL, server, load)):.2f}",
            f"{record.of(MODEL, server, ALONE)[-1].resident_mib:.0f}",
            _signed(_growth_mib(record, server)),
        )
        for server in _servers(record)
    ]
    head = (
        "",
        *(f"computed in vain at {load}" for load in LOADS),
        *(f"server's CPU ms / answer at {load}" for load in LOADS),
        "client's cores, highest",
        "resident MiB",
        "MiB grown in the second half",
    )
    return table(head, rows)


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    (record,) = records
    own = [server for server in TRANSPORTS if server in _servers(record)]
    found = [
        Verdict(
            f"goodput under overload over the peak, {server}",
            tuple(Case.of(load, _IN_TIME[load], _in_time(record, server, load)) for load in _over(record)),
            "at {}",
            _of_triton(record),
        )
        for server in own
    ]
    found += [
        _each(record, "p99 of answers at 2× over that at 0.8×", _LATER, _later),
        _each(record, f"p99 at 80 % of the peak over the latency alone, {MODEL}", _QUEUED, _queued),
        _each(record, "share of rows computed in vain at 2× and 5×", _WASTED, _in_vain),
    ]
    growth = {server: _growth_mib(record, server) for server in own}
    cases = tuple(Case.of(s, _GROWTH_MIB, [grown]) for s, grown in growth.items() if not math.isnan(grown))
    found.append(Verdict("memory grown in the second half of this part, MiB", cases, "on {}"))
    return [verdict for verdict in found if verdict.cases]


def _each(record: Record, what: str, aim: Aim, figure: Callable[[Record, str], Pooled]) -> Verdict:
    servers = _servers(record)
    pooled = {server: figure(record, server) for server in servers if _complete(record)}
    cases = tuple(Case.of(s, aim, blocks, middle) for s, (middle, blocks) in pooled.items() if s != TRITON)
    beside = [Case.of("", aim, blocks, middle).measured() for s, (middle, blocks) in pooled.items() if s == TRITON]
    return Verdict(what, cases, "on {}", "".join(f"Triton: {figure}" for figure in beside))


def _of_triton(record: Record) -> str:
    if TRITON not in _servers(record):
        return ""
    return "Triton: " + " · ".join(f"{load}: {spread(_in_time(record, TRITON, load), 2)}" for load in _over(record))


def _over(record: Record) -> list[str]:
    """The overloads that were measured."""
    loads = {subject.load for subject in record.subjects()}
    return [load for load in OVER if load in loads]


def _later(record: Record, server: str) -> Pooled:
    over, busy = (record.of(MODEL, server, load) for load in ("2×", BUSY))
    return p99_ms(over) / p99_ms(busy), [p99_ms([a]) / p99_ms([b]) for a, b in zip(over, busy, strict=True)]


def _queued(record: Record, server: str) -> Pooled:
    busy, alone = (record.of(MODEL, server, load) for load in (BUSY, ALONE))
    blocks = [p99_ms([a]) / b.p50_ms for a, b in zip(busy, alone, strict=True)]
    return p99_ms(busy) / float(np.median([s.p50_ms for s in alone])), blocks


def _in_vain(record: Record, server: str) -> Pooled:
    pairs = list(zip(*(record.of(MODEL, server, load) for load in OVER), strict=True))
    return wasted([sample for pair in pairs for sample in pair]), [wasted(pair) for pair in pairs]


def p99_ms(samples: Sequence[Sample]) -> float:
    """Of the answers of all runs together: percentiles are never averaged. NaN without answers."""
    latencies = [latency for sample in samples for latency in sample.latencies_ms]
    return float(np.percentile(latencies, 99, method="higher")) if latencies else math.nan


def wasted(samples: Sequence[Sample]) -> float:
    """The share of computed rows that nobody got in time. One request is one row."""
    computed = sum(sample.computed for sample in samples)
    return max(0, computed - sum(sample.answered for sample in samples)) / computed if computed else 0.0


def _in_time(record: Record, server: str, load: str) -> list[float]:
    """Over the peak of the same block; empty where the load was not measured."""
    rates, peaks = ([s.rate for s in record.of(MODEL, server, each)] for each in (load, PEAK))
    return ratios(rates, peaks) if rates else []


def _growth_mib(record: Record, server: str) -> float:
    """NaN from a run that is too short to tell. Readings are of the end of each window, when nothing is computed."""
    readings = [run.sample.resident_mib for block in record.blocks for run in block if run.subject.target == server]
    return growth_bytes(readings) if len(readings) >= 16 else math.nan


def _complete(record: Record) -> bool:
    """Whether every load was measured: a quick run leaves some out."""
    return set(LOADS) <= {subject.load for subject in record.subjects()}


def _servers(record: Record) -> list[str]:
    return list(dict.fromkeys(subject.target for subject in record.subjects()))


def _p99(samples: Sequence[Sample]) -> str:
    if not samples:
        return "–"
    value = p99_ms(samples)
    return "no answer in time" if math.isnan(value) else f"{value:.0f}"


def _percent(samples: Sequence[Sample]) -> str:
    return f"{100 * wasted(samples):.1f} %" if samples else "–"


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.1f}"


SECTION = Section("overload", (PART,), tables, verdicts)
