"""What was measured is kept, whole or in part, and found again."""

from __future__ import annotations

from pathlib import Path

from bench.records import Records, Sample
from tests.unit.bench.samples import record

ONE = {("m", "native", "1"): Sample(rate=1.5, latencies_ms=(1.0, 2.0))}
TWO = {("m", "native", "1"): Sample(rate=2.5, lost_points=0.25)}


def test_a_whole_part_is_read_as_it_was_kept(tmp_path: Path) -> None:
    records, kept = Records(tmp_path), record("small", ONE, TWO)
    records.keep(kept, ended=True)
    assert records.best("small") == kept
    assert records.stopped("small") is None
    assert [s.rate for s in kept.of("m", "native", "1")] == [1.5, 2.5]
    assert kept.of("m", "grpcio", "1") == []


def test_what_there_is_of_a_part_that_stopped_is_shown(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.keep(record("small", ONE, wanted=5, error="OSError: no"), ended=False)
    best = records.best("small")
    assert best is not None
    assert (len(best.blocks), best.wanted, best.error) == (1, 5, "OSError: no")


def test_a_part_that_was_whole_stays_when_the_next_run_stops(tmp_path: Path) -> None:
    """1. A whole run. 2. One that stops: the whole one is shown, the other known. 3. A whole one: nothing stopped."""
    records, whole, stopped = Records(tmp_path), record("small", ONE, TWO), record("small", TWO, error="OSError: no")
    records.keep(whole, ended=True)
    records.keep(stopped, ended=False)
    assert (records.best("small"), records.stopped("small")) == (whole, stopped)
    records.keep(record("small", TWO), ended=True)
    assert (records.best("small"), records.stopped("small")) == (record("small", TWO), None)


def test_a_part_that_gave_nothing_is_not_shown(tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert records.best("small") is None
    records.keep(record("small", wanted=5, error="OSError: no"), ended=False)
    assert records.best("small") is None
    assert records.stopped("small") is not None
