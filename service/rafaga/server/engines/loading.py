"""What is loaded onto a device, and the measurement of an engine that is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from rafaga.bundle import Bundle, EngineName, Precision
from rafaga.plain_model import PlainModel
from rafaga.server.engines.contract import Engine, run
from rafaga.server.scheduling.job import Arrays
from rafaga.server.scheduling.latency import DISPATCH_S, LatencyTable

# At least this many timed runs of each, more of quick ones, until the budget is spent.
_MIN_RUNS = 2
_MAX_RUNS = 20
_BUDGET_S = 0.05


class Samples:
    """Valid inputs of a model: one array per input, each [rows, ...]. valid: False: none are known; these only have
    the right types, and must not be run."""

    def __init__(self, inputs: Arrays, valid: bool = True) -> None:
        self.inputs = inputs
        self.valid = valid

    def tiled(self, rows: int) -> Arrays:
        """The inputs repeated up to `rows` rows."""
        return tuple(np.resize(a, (rows, *a.shape[1:])) for a in self.inputs)


@dataclass(frozen=True)
class ModelToPlace:
    """content: the ONNX file. verify: raises BundleError when an engine's answers are wrong; None: nothing is known of
    them. engine: on the CPU; GPUs have ONNX Runtime."""

    spec: Bundle | PlainModel
    content: bytes
    precision: Precision
    samples: Samples
    max_rows: int
    verify: Callable[[Engine], None] | None
    engine: EngineName = EngineName.ONNXRUNTIME


class LoadedEngine(NamedTuple):
    """An engine that was verified and warmed up, and what its runs took."""

    engine: Engine
    latency: LatencyTable


def measured(engine: Engine, samples: Samples, buckets: Sequence[int], stepped: bool = False) -> LatencyTable:
    """Runs every bucket until it is warm, and gives what each takes. `stepped`: other sizes are padded to a bucket."""
    seconds = run_seconds(engine, [samples.tiled(rows) for rows in buckets])
    return LatencyTable(buckets, [s + DISPATCH_S for s in seconds], stepped)


def run_seconds(engine: Engine, batches: Sequence[Arrays]) -> list[float]:
    """The fastest of several warm runs, for each batch."""
    return shortest([partial(run, engine, batch) for batch in batches])


def shortest(runs: Sequence[Callable[[], object]], budget_s: float = _BUDGET_S) -> list[float]:
    """Seconds of the fastest call of each, of several after the first; more for quick ones, until `budget_s` is spent.

    They take turns, so that a busy moment of the machine does not make a single one look slow.
    """
    for call in runs:
        call()
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(_MAX_RUNS):
        for call, seconds in zip(runs, taken, strict=True):
            if len(seconds) < _MIN_RUNS or sum(seconds) < budget_s:
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
    return [min(seconds) for seconds in taken]
