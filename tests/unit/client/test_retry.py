"""When to try again: pure decisions against a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafaga import errors
from rafaga.client._retry import PATIENT, Attempts, RetryPolicy, is_retryable

STEADY = RetryPolicy(max_attempts=4, initial_backoff_s=0.1, max_backoff_s=0.3, multiplier=2, jitter=0)


def test_the_servers_retry_after_replaces_the_backoff() -> None:
    assert STEADY.pause_s(errors.QueueFull("full", retry_after_s=1.5), 1, 10, 0.5) == 1.5
    assert STEADY.pause_s(errors.QueueFull("full", retry_after_s=0), 1, 10, 0.5) == 0
    assert STEADY.pause_s(errors.QueueFull("full", retry_after_s=1.5), 1, 1.5, 0.5) is None, "past the deadline"
    assert STEADY.pause_s(errors.ServerUnreachable("gone"), 1, 0.05, 0.5) is None


def test_only_safe_calls_that_may_succeed_are_tried_again() -> None:
    retryable = {cls for cls in errors._BY_REASON.values() if is_retryable(cls("…"))}
    refusals = {errors.Refused, errors.QueueFull, errors.Draining, errors.ModelNotReady}
    assert retryable == refusals | {errors.ServerUnreachable}, "not DeadlineUnreachable, though it is a refusal"


@given(
    attempt=st.integers(1, 10**9),
    remaining_s=st.floats(0, 100),
    chance=st.floats(0, 1, exclude_max=True),
    retry_after_s=st.none() | st.floats(0, 100),
)
def test_a_pause_is_never_negative_never_past_the_deadline_never_before_the_servers_time(
    attempt: int, remaining_s: float, chance: float, retry_after_s: float | None
) -> None:
    pause_s = PATIENT.pause_s(errors.QueueFull("full", retry_after_s), attempt, remaining_s, chance)
    if pause_s is not None:
        assert 0 <= pause_s < remaining_s
        assert pause_s >= (retry_after_s or 0)


def test_refusals_by_a_replica_that_stops_do_not_count_as_tries() -> None:
    """Of three replicas, three tries in a row would hit the one that drains once in 27 calls."""
    now = 100.0
    attempts = Attempts(STEADY, 1.0, clock=lambda: now, chance=lambda: 0.5)
    moves = [attempts.pause_s(errors.Draining("…")) for _ in range(8)]
    assert moves == pytest.approx([0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.2, 0.2])
    assert [attempts.pause_s(errors.ServerUnreachable("…")) for _ in range(4)] == [0.1, 0.2, 0.3, None]
    now = 100.95
    assert attempts.pause_s(errors.Draining("…")) is None, "the deadline would pass"


def test_a_model_that_is_down_everywhere_is_soon_given_up() -> None:
    attempts = Attempts(STEADY, 60.0, clock=lambda: 0.0, chance=lambda: 0.5)
    pauses = [attempts.pause_s(errors.ModelNotReady("…")) for _ in range(16)]
    assert pauses[:3] == [0, 0.01, 0.02]
    assert pauses[11:] == [0.2, 0.1, 0.2, 0.3, None], "after twelve moves its tries count"
    assert Attempts(RetryPolicy(max_attempts=1), 1.0).pause_s(errors.Draining("…")) is None


@pytest.mark.parametrize(
    ("field", "wrong"),
    [*(("initial_backoff_s", s) for s in (-1.0, 3.0)), ("multiplier", 0.5), ("multiplier", 1e9), ("jitter", 1.5)],
)
def test_policies_that_make_no_sense(field: str, wrong: float) -> None:
    with pytest.raises(ValueError):
        RetryPolicy(max_attempts=0)
    with pytest.raises(ValueError):
        RetryPolicy(**{field: wrong})  # type: ignore[arg-type]


def test_attempts_count_against_one_deadline() -> None:
    now = 100.0
    attempts = Attempts(STEADY, 1.0, clock=lambda: now, chance=lambda: 0.5)
    for now, remaining_s, pause_s in ((100.0, 1.0, 0.1), (100.75, 0.25, 0.2), (101.5, 0.0, None)):  # noqa: B007
        assert attempts.remaining_s == remaining_s
        assert attempts.pause_s(errors.QueueFull("…")) == pause_s
