"""Interleaving, rates of batches, cores for each side, memory that grows."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest

from bench.blocks import interleaved, ratios
from bench.cores import Cores, on, resident_bytes
from bench.load import steady_rate
from bench.memory import MIB, grows, growth_bytes
from bench.records import Sample, Subject
from bench.tables import spread, table

A, B = Subject("m", "a", ""), Subject("m", "b", "")


def counting(calls: list[str], name: str, failures: int = 0) -> Callable[[], Sample]:
    def measure() -> Sample:
        calls.append(name)
        if calls.count(name) <= failures:
            raise OSError(name)
        return Sample(rate=float(len(calls)))

    return measure


def test_blocks_go_forwards_and_backwards_in_turn() -> None:
    calls: list[str] = []
    blocks = list(interleaved({A: counting(calls, "a"), B: counting(calls, "b")}, 3))
    assert "".join(calls) == "abbaab"
    assert [[run.subject for run in block] for block in blocks] == [[A, B], [B, A], [A, B]]


def test_what_fails_is_tried_once_more() -> None:
    """1. Failed once: measured. 2. Failed twice: the end."""
    calls: list[str] = []
    assert len(list(interleaved({A: counting(calls, "a", failures=1)}, 2))) == 2
    with pytest.raises(OSError, match="b"):
        list(interleaved({B: counting([], "b", failures=2)}, 2))


def test_ratios_block_by_block() -> None:
    assert ratios([1.0, 4.0, 1.0], [2.0, 2.0, 0.0]) == [0.5, 2.0, 0.0]


def test_figures_in_a_table() -> None:
    assert spread([1310.0, 1204.0, 1236.0]) == "1,236 (1,204–1,310)"
    assert spread([]) == "–"
    assert table(("", "n"), [("a", "1")]) == "|  | n |\n| --- | --- |\n| a | 1 |\n"


@pytest.mark.parametrize("offset", [0.0, 0.2, 0.45])
def test_whole_batches_count(offset: float) -> None:
    """Eight answers every half a second are 16 a second, wherever the window begins."""
    ends = offset + 0.5 * np.arange(9)
    done_s = (ends[:, None] + 1e-4 * np.arange(8)).ravel()
    assert steady_rate(done_s, 4.0) == pytest.approx(16, rel=0.01)


def test_a_window_with_one_batch_counts_its_length() -> None:
    """Thirty-two answers within a millisecond are not 32,000 a second."""
    assert steady_rate(1.0 + 3e-5 * np.arange(32), 2.0) == 16
    assert steady_rate(np.empty(0), 2.0) == 0


def test_single_answers_are_batches_too() -> None:
    done_s = np.sort(np.random.default_rng(0).uniform(0, 4, 4000))
    assert steady_rate(done_s, 4.0) == pytest.approx(1000, rel=0.05)


def test_cores_are_parted_where_there_are_enough() -> None:
    assert Cores.split({0, 1}).shared
    assert Cores.split({0, 1}, least=2) == Cores(frozenset({0}), frozenset({1}))
    assert Cores.split({3}, least=2).shared
    assert Cores.split(range(8)) == Cores(frozenset(range(6)), frozenset({6, 7}))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs an affinity that can be set")
def test_a_block_runs_on_its_cores() -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    with on({core}):
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before


def test_memory() -> None:
    """1. This process has some. 2. The way up in the first half does not count. 3. A leak does."""
    assert resident_bytes(os.getpid()) > MIB
    assert growth_bytes([*(n * MIB for n in range(10)), *[10.0 * MIB] * 10]) == 0
    assert grows([float(n * MIB) for n in range(40)])
