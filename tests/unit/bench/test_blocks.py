"""Interleaved blocks, ratios and tables."""

from __future__ import annotations

from functools import partial

from bench.blocks import column, interleaved, parts, ratios
from bench.tables import spread

BLOCKS = [
    {"lenet/1/ours": {"rate": 1.0}, "lenet/1/Triton": {"rate": 2.0}, "lstm/8/ours": {"rate": 3.0}},
    {"lenet/1/ours": {"rate": 8.0}, "lenet/1/Triton": {"rate": 4.0}, "lstm/8/ours": {"rate": 5.0}},
]


def test_blocks_go_forwards_and_backwards_in_turn() -> None:
    order: list[str] = []

    def measure(name: str) -> dict[str, float]:
        order.append(name)
        return {"rate": float(len(order))}

    blocks = list(interleaved({name: partial(measure, name) for name in "ab"}, 3))
    assert "".join(order) == "abbaab"
    assert blocks[1] == {"b": {"rate": 3.0}, "a": {"rate": 4.0}}


def test_ratios_are_taken_block_by_block() -> None:
    assert ratios(BLOCKS, "lenet/1/ours", "lenet/1/Triton") == [0.5, 2.0]
    assert ratios(BLOCKS, "lenet/1/ours", "not measured") == []
    assert ratios([{"a": {"rate": 1.0}, "b": {"rate": 0.0}}], "a", "b") == []


def test_columns_and_parts_of_names() -> None:
    assert column(BLOCKS, "lstm/8/ours", "rate") == [3.0, 5.0]
    assert column(BLOCKS, "not measured", "rate") == []
    assert parts(BLOCKS, 0) == ["lenet", "lstm"]
    assert parts(BLOCKS, 2) == ["ours", "Triton"]


def test_median_and_range() -> None:
    assert spread([1310.0, 1204.0, 1236.0]) == "1,236 (1,204–1,310)"
    assert spread([1.4], 2) == "1.40"
    assert spread([-0.1234]) == "-0.123"
    assert spread([0.0, 0.0]) == "0 (0–0)"
    assert spread([]) == "–"
