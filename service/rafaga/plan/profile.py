"""The measured costs of one model on one replica: the JSON file that plans are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

SCHEMA = 1
LEVELS: NDArray[np.float64] = np.concatenate([np.arange(0.0, 99.0), [99.0, 99.5, 99.9, 100.0]])
"""Percent at which quantiles are kept."""


class ProfileError(Exception):
    """Not a profile, or too few measurements for one."""


@dataclass(frozen=True)
class MeasuredLoad:
    """A load that the profile was made from: a number of waiting callers, or Poisson arrivals at `offered` per second.

    rate: answers per second. Latencies count from when a request was due. generator_cores: of the busiest process of
    the generator.
    """

    callers: int
    offered: float
    rate: float
    p50_ms: float
    p99_ms: float
    mean_batch_rows: float
    generator_cores: float


@dataclass(frozen=True)
class Profile:
    """schema: of this file. measured: UTC, ISO 8601. payload: what was sent, in words; request_rows: rows of each.

    batch_rows and run_ms: mean duration of a run of the engine by rows in the batch; linear in between. run_spread:
    quantiles, at LEVELS, of runs over that mean. call_ms: mean time of a lone caller's request outside queue and
    engine: network, gRPC, preprocessing; call_spread: quantiles over that mean. shared_rate and shared_call_ms: the
    mean when requests arrive at random at that rate per second. crowded_rate: answers per second with the most callers:
    a backlog is answered no faster than that, even if fewer callers get more. instances: of the engine. engine: in
    words, and why it was chosen.
    """

    schema: int
    rafaga: str
    measured: str
    server: str
    model: str
    payload: str
    request_rows: int
    max_batch_size: int
    batch_rows: tuple[int, ...]
    run_ms: tuple[float, ...]
    run_spread: tuple[float, ...]
    call_ms: float
    call_spread: tuple[float, ...]
    shared_rate: float
    shared_call_ms: float
    crowded_rate: float
    steps: tuple[MeasuredLoad, ...]
    warnings: tuple[str, ...] = ()
    instances: int = 1
    engine: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError where the parts contradict each other."""
        if self.schema != SCHEMA:
            raise ValueError(f"written as schema {self.schema}; this version reads {SCHEMA}")
        if not self.batch_rows or len(self.batch_rows) != len(self.run_ms) or not _rising(self.batch_rows):
            raise ValueError("expected rising batch_rows and as many run_ms")
        if len(self.run_spread) != len(LEVELS) or len(self.call_spread) != len(LEVELS):
            raise ValueError(f"expected {len(LEVELS)} quantiles in run_spread and call_spread")
        if min(self.batch_rows[0], self.request_rows, self.max_batch_size, self.instances) < 1:
            raise ValueError("expected at least one row, and one instance")
        if (
            min(*self.run_ms, *self.run_spread, self.call_ms, self.shared_rate, self.shared_call_ms, self.crowded_rate)
            <= 0
        ):
            raise ValueError("expected positive durations and rates")

    @property
    def largest_batch(self) -> int:
        """Rows of the largest batch that was observed."""
        return self.batch_rows[-1]

    def run_s(self, rows: int) -> float:
        """Mean seconds of a run over `rows`, at most `largest_batch`."""
        return float(np.interp(rows, self.batch_rows, self.run_ms)) / 1e3


def quantiles(values: NDArray[np.float64], weights: NDArray[np.float64] | None = None) -> tuple[float, ...]:
    """At LEVELS."""
    if weights is None:
        return tuple(np.percentile(values, LEVELS).tolist())
    order = np.argsort(values)
    shares = np.cumsum(weights[order])
    return tuple(np.interp(LEVELS / 100 * shares[-1], shares, values[order]).tolist())


def read(path: Path) -> Profile:
    """Raises ProfileError or OSError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except msgspec.DecodeError as error:  # of __post_init__'s ValueErrors too
        raise ProfileError(f"{path}: not a profile of rafaga plan: {error}") from None


def write(profile: Profile, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")


def _rising(values: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(values))
