"""Measurements taken in interleaved blocks."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from bench.records import Block, Run, Sample, Subject

Measure: TypeAlias = Callable[[], Sample]


def interleaved(measures: Mapping[Subject, Measure], blocks: int) -> Iterator[Block]:
    """Every measure once per block, forwards and backwards in turn: A-B-B-A, so that a machine that drifts drifts for
    all of them. What fails is tried once more; what fails twice ends the iteration, and complete blocks stay."""
    for number in range(blocks):
        runs = []
        for subject in list(measures)[:: 1 if number % 2 == 0 else -1]:
            sample = _twice(subject, measures[subject])
            print(f"  block {number + 1}/{blocks}  {' · '.join(filter(None, subject))}: {sample}", flush=True)
            runs.append(Run(subject, sample))
        yield tuple(runs)


def _twice(subject: Subject, measure: Measure) -> Sample:
    try:
        return measure()
    except Exception:
        print(f"  {subject} failed, and is tried once more:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return measure()


def ratios(values: Sequence[float], bases: Sequence[float]) -> list[float]:
    """Block by block, because two figures of one block had the machine in the same state."""
    return [value / base if base else 0.0 for value, base in zip(values, bases, strict=True)]
