"""Records of runs that never were."""

from __future__ import annotations

from bench.records import Block, Record, Run, Sample, Subject

STARTED = "2026-01-02T03:04:05+00:00"


def record(part: str, *blocks: dict[tuple[str, str, str], Sample], wanted: int = 0, error: str = "") -> Record:
    """blocks: samples by model, target and load."""
    made: tuple[Block, ...] = tuple(tuple(Run(Subject(*key), s) for key, s in block.items()) for block in blocks)
    return Record(part, STARTED, "a machine.", wanted or len(blocks), made, ("A note.",), error)
