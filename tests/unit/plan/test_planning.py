"""Plans of pretended replicas whose limits are known."""

from __future__ import annotations

import math

import msgspec
import pytest

from rafaga.plan import planning, text
from rafaga.plan.planning import Plan, Unreachable, plan
from rafaga.plan.profile import MeasuredLoad, Profile
from tests.unit.plan.profiles import profile


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_SEARCH_REQUESTS", 800)
    monkeypatch.setattr(planning, "_TOLD_REQUESTS", 2000)


def linear(row_ms: float) -> Profile:
    """Rows cost the same in any batch."""
    return profile([row_ms * (1 << k) for k in range(3)])


def test_as_many_replicas_as_the_rate_needs_and_with_one_lost() -> None:
    """Each of them answers less than 100 requests/s, and nearly as many within half a second."""
    made = plan(linear(10), rate=350, slo_p99_ms=500)
    assert 80 < made.max_rate_per_replica < 100
    assert made.replicas == math.ceil(350 / made.max_rate_per_replica)
    assert made.with_all.rate == pytest.approx(350 / made.replicas)
    assert made.with_all.met
    assert made.headroom == pytest.approx(made.replicas * made.max_rate_per_replica / 350 - 1)
    assert made.replicas_to_lose_one == made.replicas + 1
    assert made.with_one_lost is not None
    assert made.with_one_lost.rate == pytest.approx(350 / (made.replicas - 1))
    assert not made.with_one_lost.met
    assert made.with_one_lost.refused > 0
    spared = plan(linear(10), rate=100, slo_p99_ms=500, headroom=1.5)
    assert spared.with_one_lost is not None
    assert spared.with_one_lost.met


def test_a_model_that_gains_by_batching_batches() -> None:
    made = plan(profile([4 + 0.13 * (1 << k) for k in range(6)]), rate=3000, slo_p99_ms=40)
    assert made.settings.max_batch_size == 32
    assert made.max_rate_per_replica > 2500, "one by one it would be 240"
    assert any(each.settings.max_queue_delay_us > 0 for each in made.considered)


def test_batches_are_as_large_as_the_objective_allows() -> None:
    """Large batches are a little more efficient and take longer than the objective."""
    made = plan(profile([4 + 16 * (1 << k) for k in range(6)]), rate=40, slo_p99_ms=200)
    assert made.settings.max_batch_size <= 8
    assert made.with_all.met


def test_batches_that_a_server_never_formed_are_not_planned_with() -> None:
    """It may form 32, and found that four are as good: so do its replicas, and nothing has to be set."""
    made = plan(profile([10.3, 20.2, 40.1], max_batch_size=32), rate=60, slo_p99_ms=200)
    assert (made.replicas, made.settings.max_batch_size) == (1, 32)
    assert made.max_rate_per_replica > 70
    assert made.with_all.mean_batch_rows <= 4


def test_an_objective_below_one_run_is_out_of_reach() -> None:
    with pytest.raises(Unreachable, match=r"within 5 ms.*takes 10\.\d\d ms at p99"):
        plan(linear(10), rate=10, slo_p99_ms=5)


def test_a_check_that_fails_is_warned_of() -> None:
    """In the text and the JSON alike, together with the profile's own warnings."""

    def made(p99_ms: float) -> Plan:
        steps = (MeasuredLoad(0, 50.0, 50.0, 10.5, p99_ms, 1.2, 0.1),)
        return plan(profile([10, 20], steps=steps, warnings=("measured beside others",)), rate=50, slo_p99_ms=500)

    check = made(1.0).check
    assert check is not None
    doubt = "the profile does not hold at 50.0 requests/s"
    for times, warned in ((1.4, False), (1.6, True)):
        found = made(times * check.simulated_p99_ms)
        assert len(found.warnings) == 1 + warned
        assert (f"warning: {doubt}" in say(found)) is warned
        assert (doubt in msgspec.json.encode(found).decode()) is warned


def say(made: Plan) -> str:
    return "\n".join(text.lines(made))


def test_what_people_read() -> None:
    several = plan(profile([10], warnings=("measured beside others",)), rate=350, slo_p99_ms=500)
    single = plan(profile([10], instances=2, engine="openvino: as configured"), rate=1, slo_p99_ms=500)
    for made, sentence in (
        (several, "net: 4 replicas for 350 requests/s with p99 within 500 ms"),
        (several, "--max-batch-size 1 --max-queue-delay-us 0 --max-queue-wait-ms 490"),
        (several, "5 replicas meet the objective with one of them lost"),
        (several, "warning: measured beside others"),
        (single, "one lost: none left"),
        (single, "measured with 2 instances in openvino: as configured"),
    ):
        assert sentence in say(made)
    assert "measured with" not in say(several)
