"""The budget of a GPU's memory: arithmetic, refusals, and that everything is released."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafaga.bundle import TensorSpec
from rafaga.errors import BundleError, DeviceMemoryError
from rafaga.server.engines.memory_budget import HEADROOM, MIB, MemoryBudget, estimate


def test_reserve_and_release() -> None:
    budget = MemoryBudget("cuda:0", 100 * MIB)
    a, b = budget.reserve("a", 60 * MIB), budget.reserve("b", 40 * MIB)
    assert budget.taken == 100 * MIB
    budget.release(a)
    budget.release(a)
    assert budget.taken == 40 * MIB
    budget.release(b)
    assert budget.taken == 0


def test_a_refusal_lists_the_models_that_hold_memory() -> None:
    budget = MemoryBudget("cuda:1", 100 * MIB)
    budget.reserve("vgg16", 70 * MIB)
    with pytest.raises(DeviceMemoryError, match=r"resnet50 needs about 31 MiB of cuda:1, 30 of 100 MiB are left"):
        budget.reserve("resnet50", 31 * MIB)
    with pytest.raises(BundleError, match=r"held by vgg16 70 MiB"):
        budget.reserve("resnet50", 31 * MIB)
    assert budget.taken == 70 * MIB, "a refusal takes nothing"
    budget.reserve("resnet50", 30 * MIB)


def test_the_measured_size_replaces_the_estimate() -> None:
    budget = MemoryBudget("cuda:0", 100)
    reservation = budget.reserve("a", 90)
    budget.settle(reservation, 20)
    assert budget.taken == 20
    budget.reserve("b", 80)
    budget.settle(reservation, 120)  # more than was thought: the next one is refused
    with pytest.raises(DeviceMemoryError, match="0 of 0 MiB are left"):
        budget.reserve("c", 1)


def test_the_measured_size_may_pass_the_budget_by_the_headroom() -> None:
    budget = MemoryBudget("cuda:0", 100)
    a, b = budget.reserve("a", 60), budget.reserve("b", 40)
    budget.settle(a, 60 + HEADROOM)
    with pytest.raises(DeviceMemoryError, match=r"b took 0 MiB of cuda:0, 0 of 0 MiB are left .*: serve fewer"):
        budget.settle(b, 41)
    assert (a.size, b.size, budget.taken) == (60 + HEADROOM, 40, 100 + HEADROOM)


@settings(derandomize=True, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=20))
def test_never_more_than_the_total(loads: list[tuple[int, bool]]) -> None:
    budget, held = MemoryBudget("cuda:0", 100), []
    for size, release in loads:
        try:
            held.append(budget.reserve("m", size))
        except DeviceMemoryError:
            assert size > 100 - sum(r.size for r in held)
        if release and held:
            budget.release(held.pop())
        assert budget.taken == sum(r.size for r in held) <= 100


def test_the_estimate_counts_weights_and_buffers() -> None:
    image = TensorSpec(name="image", dtype="uint8", shape=(None, 224, 224, 3))
    logits = TensorSpec(name="logits", dtype="float32", shape=(None, 1000))
    nothing = estimate(0, (), 32, 2)
    assert estimate(100 * MIB, (), 32, 2) - nothing == 200 * MIB
    assert estimate(0, (image, logits), 32, 2) - nothing == 2 * 32 * (224 * 224 * 3 + 4000)
    free = TensorSpec(name="history", dtype="float32", shape=(None, None))
    text = TensorSpec(name="text", dtype="object", shape=(None,))
    assert estimate(0, (free, text), 1, 1) - nothing == 4
