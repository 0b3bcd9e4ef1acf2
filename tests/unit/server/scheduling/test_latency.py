"""The latency table: what it predicts, how it learns, and what it must not unlearn or learn for ever."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafaga.server.scheduling.latency import LatencyTable, buckets_up_to

BUCKETS = (1, 2, 4, 8)
SECONDS = (0.080, 0.090, 0.110, 0.160)


@pytest.fixture
def table() -> LatencyTable:
    return LatencyTable(BUCKETS, SECONDS)


@pytest.mark.parametrize(
    ("most", "buckets"),
    [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12)), (33, (1, 2, 4, 8, 16, 32, 33))],
)
def test_buckets(most: int, buckets: tuple[int, ...]) -> None:
    assert buckets_up_to(most) == buckets


@pytest.mark.parametrize("buckets", [(), (1, 1), (2, 1), (1, 2, 3)])
def test_buckets_rise_and_have_one_measurement_each(buckets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rising buckets"):
        LatencyTable(buckets, (0.1, 0.1))


@pytest.mark.parametrize(
    ("rows", "cost", "seconds"),
    [
        *((rows, 1.0, seconds) for rows, seconds in zip(BUCKETS, SECONDS, strict=True)),
        (3, 1.0, 0.100),
        (7, 1.0, 0.1475),
        (16, 1.0, 0.320),  # more than the largest batch takes several runs
        (19, 1.0, 0.320 + 0.100),
        (0, 1.0, 0.0),
        (2, 3.0, 0.270),
    ],
)
def test_predictions(table: LatencyTable, rows: int, cost: float, seconds: float) -> None:
    assert table.predict(rows, cost) == pytest.approx(seconds)


def test_a_first_bucket_above_one() -> None:
    assert LatencyTable((4, 8), (0.1, 0.2)).predict(1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [
        (SECONDS, 8),
        ((0.020, 0.040, 0.080, 0.160), 1),  # rows cost the same in every batch
        ((0.020, 0.0300, 0.0576, 0.1142), 2),  # five per cent are not worth waiting for
        ((0.020, 0.0300, 0.0560, 0.1120), 4),
    ],
)
def test_efficient_rows(seconds: tuple[float, ...], rows: int) -> None:
    """The warm-up settles them. Runs are not made under equal conditions: a slow period at one size would rule it out
    for ever."""
    table = LatencyTable(BUCKETS, seconds)
    assert table.efficient_rows == rows
    for _ in range(100):
        table.observe(8, 10.0)
    assert table.efficient_rows == rows


class TestLearning:
    @pytest.mark.parametrize("rows", [1, 4])
    def test_runs_correct_their_size_and_the_others_follow(self, table: LatencyTable, rows: int) -> None:
        """The machine has become three times as slow, whatever the size."""
        for _ in range(1000):
            table.observe(rows, 3 * SECONDS[BUCKETS.index(rows)])
        assert table.predict(rows) == pytest.approx(3 * SECONDS[BUCKETS.index(rows)], rel=0.01)
        assert table.predict(8) == pytest.approx(3 * SECONDS[3], rel=0.05)

    def test_a_bad_spell_of_one_size_is_forgotten_though_it_is_not_run(self, table: LatencyTable) -> None:
        """A size predicted to be too slow is refused and not run: only runs of other sizes correct it."""
        for _ in range(50):
            table.observe(8, 16.0)
        assert table.predict(8) > 5.0
        for _ in range(1000):
            table.observe(1, SECONDS[0])
        assert table.predict(8) == pytest.approx(SECONDS[3], rel=0.05)

    def test_costs_do_not_spoil_each_other(self, table: LatencyTable) -> None:
        """A hundredth of the work takes half of the time: that says nothing of the whole work."""
        for _ in range(500):
            table.observe(1, 0.040, cost=0.01)
            table.observe(1, 0.080, cost=1.0)
        assert table.predict(1, cost=0.01) == pytest.approx(0.040, rel=0.15)
        assert table.predict(1, cost=1.0) == pytest.approx(0.080, rel=0.05)

    def test_the_spread_is_that_of_the_runs(self, table: LatencyTable) -> None:
        assert table.spread == 0.0
        for n in range(300):
            table.observe(1, SECONDS[0] * (1.2 if n % 2 else 0.8))
        assert table.spread == pytest.approx(0.2, abs=0.05)

    @settings(max_examples=50)
    @given(st.lists(st.tuples(st.integers(1, 8), st.floats(0, 1e6), st.sampled_from([1e-3, 0.3, 1.0, 7.0, 1e4]))))
    def test_predictions_stay_sane(self, runs: list[tuple[int, float, float]]) -> None:
        table = LatencyTable(BUCKETS, SECONDS)
        for rows, seconds, cost in runs:
            table.observe(rows, seconds, cost)
        for cost in (1e-3, 1.0, 1e4):
            assert all(0 < table.predict(rows, cost) < 1e7 * max(1.0, cost) for rows in range(1, 20))
        assert 0 <= table.spread <= 2.0


def test_batches_are_padded_to_buckets_where_runs_are_stepped() -> None:
    stepped = LatencyTable((1, 4, 8), [0.1, 0.2, 0.3], stepped=True)
    assert [stepped.rows_run(rows) for rows in (1, 3, 4, 5, 8)] == [1, 4, 4, 8, 8]
    assert LatencyTable((1, 4, 8), [0.1, 0.2, 0.3]).rows_run(3) == 3
