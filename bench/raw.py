"""ONNX Runtime alone: what a model gives at its best batch size when nothing is served."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from rafaga import bundle as bundles
from rafaga.bundle import Precision
from rafaga.server.engines.onnxruntime import Engine, Golden
from rafaga.server.scheduling.latency import buckets_up_to

_LONGEST_RUN_S = 0.75


class RawModel(NamedTuple):
    engine: Engine
    golden: Golden
    best_rows: int

    def rate(self, seconds: float) -> float:
        """Rows per second over `seconds` of batches of the best size."""
        inputs = self.golden.tiled(self.best_rows)
        rows, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            self.engine.run(inputs)
            rows += self.best_rows
        return rows / elapsed


def load(folder: Path, precision: Precision, threads: int, try_s: float) -> RawModel:
    """Loads a variant with the server's session options and finds the batch size of the best throughput, each tried for
    `try_s`, of those that are computed quickly enough for a window to hold several.

    Raises ValueError where the bundle lacks the variant.
    """
    bundle = bundles.load(folder)
    variant = bundle.variant(precision)
    if variant is None:
        raise ValueError(f"{folder} has no {precision} variant")
    golden = Golden.load(bundle, folder / bundles.GOLDEN)
    engine = Engine.load(bundle, (folder / variant.file).read_bytes(), golden, threads)
    best = RawModel(engine, golden, 1)
    best_rate = best.rate(try_s)
    for rows in buckets_up_to(bundle.max_batch_size)[1:]:
        tried = RawModel(engine, golden, rows)
        if rows > _LONGEST_RUN_S * best_rate:
            break
        if (rate := tried.rate(try_s)) > best_rate:
            best, best_rate = tried, rate
    return best
