"""The tail of a model that gains from batches: what is offered, what is read from the client, what is judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import tail, triton
from bench.plan import QUICK, Plan, Task
from bench.records import Sample
from tests.unit.bench.samples import record

LENET = "lenet5-mnist"
CALM = """Request Rate: 4000 inference requests per seconds
  Client:
    Request count: 9522
    Throughput: 3987.5 infer/sec
    Avg latency: 1222 usec (standard deviation 841 usec)
    p50 latency: 957 usec
    p99 latency: 4494 usec
"""
WARNING = "[WARNING] Perf Analyzer was not able to keep up with the desired rate. 1.14% of the requests were delayed."


def test_what_perf_analyzer_tells() -> None:
    calm = triton.reported(CALM)
    assert (calm.rate, calm.p50_ms, calm.p99_ms, calm.late) == (3987.5, 0.957, 4.494, 0.0)
    assert triton.reported(CALM + WARNING).late == pytest.approx(0.0114)
    assert triton.reported(CALM.replace("3987.5", "1.0") + WARNING + CALM) == calm, "the last load counts"
    with pytest.raises(RuntimeError, match="told no figures"):
        triton.reported("Failed to obtain stable measurement.")


def test_80_per_cent_of_the_peak_that_was_measured_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every peak is ten requests per second below the one before; blocks go forwards and backwards."""
    peaks, offered = [1000.0], []

    def analyze(_: object, target: str, model: str, load: Sequence[str], *rest: object) -> Sample:
        assert (target, model) == ("server", LENET)
        if load == triton.closed(32):
            peaks.append(peaks[-1] - 10)
            return Sample(rate=peaks[-1])
        if load != triton.closed(1):
            offered.append((load, peaks[-1]))
        return Sample(rate=1.0)

    @contextmanager
    def serving(*_: object, **__: object) -> Iterator[dict[str, Any]]:
        yield {"native": "server"}

    monkeypatch.setattr(tail, "peers", lambda: Path("peers"))
    monkeypatch.setattr(tail, "serving", serving)
    monkeypatch.setattr(tail, "analyze", analyze)
    blocks = list(tail.measure(Task(Path(), Plan(blocks=2), lambda _: None)))
    assert [peak for _, peak in offered] == [980.0, 980.0]
    assert all(load == triton.poisson(0.8 * peak) for load, peak in offered)
    assert [[run.subject.load for run in block] for block in blocks] == [
        ["alone", "peak", "80 %"],
        ["80 %", "peak", "alone"],
    ]


def test_without_a_peer_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(triton.ENVIRONMENT, raising=False)
    with pytest.raises(RuntimeError, match="RAFAGA_PEERS"):
        next(tail.measure(Task(Path(), QUICK, lambda _: None)))


def samples(p99_ms: float, server: str) -> dict[tuple[str, str, str], Sample]:
    return {
        (LENET, server, "alone"): Sample(rate=2000.0, p50_ms=0.5, p99_ms=0.6),
        (LENET, server, "peak"): Sample(rate=8000.0, p50_ms=4.0, p99_ms=6.0),
        (LENET, server, "80 %"): Sample(rate=6400.0, p50_ms=1.0, p99_ms=p99_ms, late=0.05, client_cores=0.5),
    }


def test_the_p99_is_judged_by_the_latency_of_one_caller() -> None:
    """Block by block: the median decides, Triton stands beside it."""
    blocks = [samples(p99, "native") | samples(2.0, "grpcio") | samples(4.0, "Triton") for p99 in (1.0, 1.25, 9.0)]
    (verdict,) = tail.verdicts([record("tail", *blocks)])
    assert verdict.what == f"p99 at 80 % of the peak over the latency alone, {LENET}"
    assert verdict.found() == "reached on native; **not reached** on grpcio: 4.00 of at most 3"
    assert verdict.cases[0].measured() == "2.50 (2.00–18.00)"
    assert verdict.beside == "Triton: 8.00 (8.00–8.00)"
    row = "| native | 8,000 (8,000–8,000) | 0.80 (0.80–0.80) | 0.50 (0.50–0.50) | 1.00 (1.00–1.00) | 1.25 (1.00–9.00) |"
    assert f"{row} 2.5 (2.0–18.0) | 5.0 (5.0–5.0) | 0.50 (0.50–0.50) |" in tail.tables([record("tail", *blocks)])
