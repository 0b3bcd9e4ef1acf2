"""Tables and verdicts of each section, from figures that are known."""

from __future__ import annotations

from bench import goodput, small
from bench.records import Record, Sample
from tests.unit.bench.samples import record

LENET = "lenet5-mnist"
MIB = {"grpcio": 100.0, "native": 200.0, "Triton": 300.0}


def beside_triton(**rates: float) -> dict[tuple[str, str, str], Sample]:
    """Requests per second of a server, at 8 callers."""
    return {(LENET, server, "8"): Sample(rate=rate, p50_ms=1.0, p99_ms=2.0) for server, rate in rates.items()}


def test_the_fastest_transport_is_judged_and_the_other_stands_beside_it() -> None:
    """Ratios are of the same block: the second one, where everybody is slow, is no worse than the first."""
    runs = record(
        "small",
        beside_triton(grpcio=500.0, native=1500.0, Triton=1000.0),
        beside_triton(grpcio=250.0, native=750.0, Triton=500.0),
    )
    verdict = next(v for v in small.verdicts([runs]) if LENET in v.what)
    assert verdict.cells() == (
        f"requests/s over Triton's, {LENET}, native",
        "≥ 1.4",
        "8: 1.50 (1.50–1.50)",
        "reached",
        "grpcio: 0.50",
    )
    assert "| native | 8 | 1,125 (750–1,500) | 1.50 (1.50–1.50) |" in small.tables([runs])


def test_a_lone_request_without_a_triton() -> None:
    lone = {(LENET, t, "lone"): Sample(p50_ms=1.0, queue_p50_ms=ms) for t, ms in (("grpcio", 0.2), ("native", 0.02))}
    runs = record("small", lone)
    (verdict,) = (v for v in small.verdicts([runs]) if v.cases)
    assert verdict.found() == "reached on native; **not reached** on grpcio: 0.20 of at most 0.1"
    assert "Triton" not in small.tables([runs])


def overload(blocks: int = 5) -> Record:
    """grpcio keeps its peak and native loses a fifth at five times it; Triton answers nobody there."""

    def sample(server: str, load: str, number: int) -> Sample:
        rate = {"alone": 20.0, "peak": 50.0, "0.8×": 40.0, "2×": 50.0, "5×": 50.0}[load]
        if load == "5×":
            rate = {"grpcio": 50.0, "native": 40.0, "Triton": 0.0}[server]
        latencies = {"alone": (), "peak": (), "0.8×": (10.0, 30.0), "2×": (10.0, 60.0), "5×": (10.0, 70.0)}[load]
        grown = number * (2.0 if server == "native" else 0.0)
        return Sample(
            rate=rate,
            p50_ms=10.0,
            answered=int(rate),
            computed=50,
            latencies_ms=latencies if rate else (),
            resident_mib=MIB[server] + grown,
        )

    loads = ("alone", "peak", "0.8×", "2×", "5×")
    return record(
        "overload",
        *({("googlenet", s, load): sample(s, load, number) for s in MIB for load in loads} for number in range(blocks)),
    )


def test_overload() -> None:
    found = {verdict.what: verdict for verdict in goodput.verdicts([overload()])}
    over = {s: found[f"goodput under overload over the peak, {s}"] for s in ("grpcio", "native")}
    assert over["grpcio"].found() == "reached"
    assert over["native"].found() == "reached at 2×; **not reached** at 5×: 0.80 of 0.9"
    assert over["native"].beside == "Triton: 2×: 1.00 (1.00–1.00) · 5×: 0.00 (0.00–0.00)"
    later = found["p99 of answers at 2× over that at 0.8×"]
    assert later.found() == "**not reached** on grpcio: 2.00 of at most 1.5, on native: 2.00 of at most 1.5"
    assert found["p99 at 80 % of the peak over the latency alone, googlenet"].reached
    vain = found["share of rows computed in vain at 2× and 5×"]
    assert vain.found() == "reached on grpcio; **not reached** on native: 0.10 of at most 0.01"
    assert vain.beside == "Triton: 0.50 (0.50–0.50)"
    grown = found["memory grown in the second half of this part, MiB"]
    assert [case.reached for case in grown.cases] == [True, True]
    assert grown.cases[1].middle > grown.cases[0].middle == 0.0


def test_overload_in_a_table() -> None:
    text = goodput.tables([overload()])
    row = "| Triton | 50.0 (50.0–50.0) | 0.80 (0.80–0.80) | 1.00 (1.00–1.00) | 0.00 (0.00–0.00) | 10.0 (10.0–10.0) |"
    assert f"{row} 30 | 60 | no answer in time |" in text
    assert "| Triton | 20.0 % | 0.0 % | 100.0 % |" in text


def test_a_quick_run_shows_what_it_has() -> None:
    """One block without the loads of 0.8 and 5."""
    whole = overload(1)
    loads = ("alone", "peak", "2×")
    quick = record("overload", {run.subject: run.sample for run in whole.blocks[0] if run.subject.load in loads})
    assert "| grpcio | 50.0 (50.0–50.0) | – | 1.00 (1.00–1.00) | – |" in goodput.tables([quick])
    assert [verdict.found() for verdict in goodput.verdicts([quick])] == ["reached", "reached"]


def test_percentiles_are_of_all_answers_together() -> None:
    few, many = Sample(latencies_ms=(100.0,)), Sample(latencies_ms=tuple(float(n) for n in range(1, 300)))
    assert goodput.p99_ms([few, many]) == 297.0
