"""The page: what was measured between its markers, what people wrote untouched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gpu, page
from bench.command import SECTIONS
from bench.plan import Plan, Section
from bench.records import Records, Sample
from tests.unit.bench.samples import record

PAGE = Path(__file__).resolve().parents[3] / "docs/benchmarks.md"
GOOGLENET: Mapping[tuple[str, str, str], Sample] = {
    ("googlenet", "raw", "fp32"): Sample(rate=100.0, rows=16),
    ("googlenet", "raw", "int8"): Sample(rate=300.0, rows=8),
    ("googlenet", "grpcio", "fp32"): Sample(rate=93.0, client_cores=0.3),
    ("googlenet", "native", "fp32"): Sample(rate=97.0, client_cores=0.2),
    ("googlenet", "native", "int8"): Sample(rate=260.0, client_cores=0.8),
}


def test_only_what_stands_between_markers_changes() -> None:
    text = "By hand.\n<!-- measured: a -->\nold\n<!-- end of a -->\nToo.\n<!-- measured: b -->\nb\n<!-- end of b -->\n"
    new = page.rendered(text, {"a": "| \\1 |\n"})
    assert new == text.replace("old", "| \\1 |")
    assert page.rendered(new, {"a": "| \\1 |\n"}) == new


def test_markers_that_lack_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected <!-- measured: b --> … <!-- end of b --> once in the page"):
        page.rendered("<!-- measured: a -->\n<!-- end of a -->\n", {"b": ""})


def test_the_real_page_has_a_place_for_every_section() -> None:
    text = PAGE.read_text()
    parts = (page.VERDICTS, page.RUNS, gpu.PART, *(section.name for section in SECTIONS))
    marked = page.rendered(text, dict.fromkeys(parts, "measured"))
    assert marked.count("measured\n") == len(parts)


def test_without_records_nothing_is_rendered(tmp_path: Path) -> None:
    assert page.measured(Records(tmp_path), SECTIONS) == {}


def test_a_part_that_was_measured_alone(tmp_path: Path) -> None:
    """1. Its table, its notes, its verdicts, when and where. 2. Nothing of sections that were never measured."""
    records = Records(tmp_path)
    records.keep(record("googlenet", dict(GOOGLENET)), ended=True)
    found = page.measured(records, SECTIONS)
    assert found.keys() == {"large", page.VERDICTS, page.RUNS}
    assert found["large"].startswith("A note.\n")
    assert "| googlenet | 100.0 (100.0–100.0) in 16 | 0.93 (0.93–0.93) | 0.97 (0.97–0.97) |" in found["large"]
    verdicts = found[page.VERDICTS]
    assert "reached on native; **not reached** on grpcio: 0.93 of 0.95" in verdicts
    assert "| not measured | closed: googlenet 0.80 |" in verdicts
    assert found[page.RUNS] == "googlenet (2026-01-02, 1 blocks): a machine.\n"


@pytest.mark.parametrize(
    ("machine", "beside"),
    [
        ("2 cores (avx2 avx512_vnni)", "random weights"),
        ("2 cores (avx2)", "random weights, a processor without VNNI"),
    ],
)
def test_int8_is_told_with_what_its_aim_presupposes(tmp_path: Path, machine: str, beside: str) -> None:
    records = Records(tmp_path)
    records.keep(replace(record("googlenet", dict(GOOGLENET)), machine=machine), ended=True)
    assert f"| reached | {beside} |" in page.measured(records, SECTIONS)[page.VERDICTS]


def test_the_load_generator_is_judged_where_it_may_send_late(tmp_path: Path) -> None:
    """The highest of all blocks, of the loads that do not wait for answers."""
    records = Records(tmp_path)
    used = {"alone": 0.1, "peak": 0.9, "0.8×": 0.3, "2×": 0.5, "5×": 0.75}
    busy = {load: Sample(rate=1.0, p50_ms=1.0, client_cores=cores) for load, cores in used.items()}
    calm = {load: Sample(rate=1.0, p50_ms=1.0, client_cores=0.25) for load in used}
    blocks = [{("googlenet", "native", load): sample for load, sample in each.items()} for each in (busy, calm)]
    records.keep(record("overload", *blocks), ended=True)
    verdicts = page.measured(records, SECTIONS)[page.VERDICTS]
    assert "| overload: 0.75 (0.25–0.75) | **not reached** in overload: 0.75 of at most 0.7 |" in verdicts
    assert "| closed: overload 0.90 |" in verdicts


def test_a_part_that_failed_is_named_beside_what_was_measured_before(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.keep(record("googlenet", dict(GOOGLENET)), ended=True)
    records.keep(record("googlenet", wanted=5, error="RuntimeError: Triton\n did not start"), ended=False)
    found = page.measured(records, SECTIONS)
    assert "0.97 (0.97–0.97)" in found["large"]
    assert "**The last run of googlenet**" in found[page.RUNS]
    assert "**stopped** after 0 of 5 blocks: RuntimeError: Triton did not start" in found[page.RUNS]


def test_a_run_takes_no_longer_than_it_may() -> None:
    def minutes(sections: Sequence[Section], plan: Plan) -> float:
        return sum(part.budget_s(plan) for section in sections for part in section.parts) / 60

    assert minutes(SECTIONS, Plan()) <= 30
    assert minutes(SECTIONS, Plan(blocks=10)) > 45
