"""ONNX Runtime alone: what a model gives at its best batch size when nothing is served."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from rafaga import bundle as bundles
from rafaga.bundle import Precision
from rafaga.server.engine import Engine, Golden
from rafaga.server.latency import buckets_up_to


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


def load(folder: Path, threads: int) -> RawModel:
    """Loads the fp32 variant with the server's session options and finds the batch size of the best throughput."""
    bundle = bundles.load(folder)
    variant = bundle.variant(Precision.FP32)
    assert variant is not None, f"{folder} has no fp32 variant"
    golden = Golden.load(bundle, folder / bundles.GOLDEN)
    engine = Engine.load(bundle, (folder / variant.file).read_bytes(), golden, threads)
    rates = {rows: RawModel(engine, golden, rows).rate(1.0) for rows in buckets_up_to(bundle.max_batch_size)}
    return RawModel(engine, golden, max(rates, key=lambda rows: rates[rows]))
