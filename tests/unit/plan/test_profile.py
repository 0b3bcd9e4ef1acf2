"""From answers of known runs to a profile; what it holds, and why other files are refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from rafaga.load.schedule import Pattern
from rafaga.load.steps import Step
from rafaga.plan import profile as profiles
from rafaga.plan.measure import MeasuredAnswers, profile_of
from rafaga.plan.profile import LEVELS, ProfileError, quantiles
from tests.unit.plan.profiles import profile


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    original = profile([10, 12, 16], warnings=("beware",))
    profiles.write(original, tmp_path / "net.json")
    assert profiles.read(tmp_path / "net.json") == original


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a profile"),
        (b"{}", "missing required field"),
        (b'{"steps": 3}', "steps"),
        (msgspec.json.encode(profile([1])).replace(b'"schema":1', b'"schema":2'), "schema 2; this version reads 1"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "net.json").write_bytes(content)
    with pytest.raises(ProfileError, match=rf"net\.json: .*{message}"):
        profiles.read(tmp_path / "net.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("batch_rows", rows) for rows in ((2, 1), (), (1,))),
        *(("run_spread", (1.0,)), ("call_ms", 0.0), ("crowded_rate", 0.0), ("request_rows", 0), ("instances", 0)),
    ],
)
def test_parts_that_contradict_each_other(field: str, value: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        profile([1, 2], **{field: value})


def test_quantiles_count_by_weight() -> None:
    values = np.arange(1000.0)
    assert quantiles(values) == pytest.approx(LEVELS / 100 * 999)
    heavy = np.where(values < 500, 3.0, 1.0)
    assert np.interp(75, LEVELS, quantiles(values, heavy)) == pytest.approx(500, abs=2)


CLOSED = Step(Pattern.CLOSED, callers=1, duration_s=2.0)


def answers(step: Step, sizes: list[int], call_ms: float, cores: float = 0.1, rows: int = 1) -> MeasuredAnswers:
    """A hundred runs of each size at 5 ms and 1 ms per row, a tenth of them half as long again; `rows` to a request."""
    rng = np.random.default_rng(0)
    runs = [(size, (5 + size) * (1.5 if k % 10 == 0 else 1.0)) for size in sizes for k in range(100)]
    batch, run_ms = (np.array([run[i] for run in runs for _ in range(run[0] // rows)], float) for i in (0, 1))
    calls_ms = call_ms * rng.uniform(0.5, 1.5, len(batch))
    return MeasuredAnswers(step, calls_ms + run_ms, calls_ms, run_ms, batch, cores)


def open_loop(rate: float) -> Step:
    return Step(Pattern.POISSON, rate=rate, duration_s=2.0)


def test_the_run_table_is_found_again() -> None:
    crowd = Step(Pattern.CLOSED, callers=64, duration_s=2.0)
    found = [answers(CLOSED, [1], 2.0), answers(crowd, [3, 7, 12, 20, 27, 30], 9.0), answers(open_loop(50), [2], 4.0)]
    profile = profile_of(found, request_rows=1)
    assert profile.batch_rows == (1, 2, 4, 8, 16, 30)
    assert profile.run_ms == pytest.approx([1.05 * (5 + rows) for rows in profile.batch_rows], rel=0.01)
    assert profile.run_spread[50] == pytest.approx(1 / 1.05, rel=0.02)
    assert profile.run_spread[-1] == pytest.approx(1.5 / 1.05, rel=0.02)
    assert profile.call_ms == pytest.approx(2.0, rel=0.1)
    assert (profile.call_spread[0], profile.call_spread[-1]) == pytest.approx((0.5, 1.5), rel=0.1)
    assert profile.shared_call_ms == pytest.approx(4.0, rel=0.1)
    assert profile.crowded_rate == pytest.approx(100 * (3 + 7 + 12 + 20 + 27 + 30) / 2)
    assert [(m.callers, m.offered) for m in profile.steps] == [(1, 0.0), (64, 0.0), (0, 50)]
    assert profile.steps[1].mean_batch_rows == pytest.approx(np.mean([3, 7, 12, 20, 27, 30]))


def test_larger_batches_are_never_quicker() -> None:
    one = answers(CLOSED, [8], 1.0)
    slow = MeasuredAnswers(one.step, one.latency_ms, one.call_ms, 10 * one.run_ms, one.batch_rows / 2, 0.1)
    profile = profile_of([slow, one, answers(open_loop(10), [8], 1.0)], request_rows=1)
    assert list(profile.run_ms) == sorted(profile.run_ms)


def test_requests_of_several_rows_count_a_run_once() -> None:
    found = [answers(CLOSED, [4], 1.0, rows=4), answers(open_loop(10), [8], 1.0, rows=4)]
    profile = profile_of(found, request_rows=4)
    assert (profile.batch_rows, profile.request_rows) == ((4, 8), 4)
    assert profile.run_ms == pytest.approx([1.05 * 9, 1.05 * 13], rel=0.01)
