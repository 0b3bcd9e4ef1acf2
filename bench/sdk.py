"""The SDK: many images by `classify_many`, compared with a call for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np

from bench.blocks import Blocks, Cells, Figures, Plan, column, ratios
from bench.models import LENET
from bench.servers import rafaga
from bench.tables import Table, spread
from rafaga import Client

_IMAGES, _THREADS = 256, 8
_ONE = "one call each"


@contextmanager
def cells(plan: Plan) -> Iterator[Cells]:
    images = np.random.default_rng(0).integers(0, 256, (_IMAGES, 28, 28, 1), np.uint8)
    with (
        rafaga(plan.repository, (LENET,), "--device", "cpu", "--precision", "fp32", "--threads", "1") as target,
        Client(target.address) as client,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        classify = partial(client.classify, model=LENET)
        ways: dict[str, Callable[[], object]] = {
            _ONE: lambda: [classify(image) for image in images],
            f"one call each, {_THREADS} threads": lambda: list(pool.map(classify, images)),
            "classify_many": lambda: client.classify_many(images, model=LENET),
        }
        yield {name: partial(_rate, way, plan.seconds) for name, way in ways.items()}


def _rate(way: Callable[[], object], seconds: float) -> Figures:
    """Inputs per second. The first pass is not counted."""
    way()
    passes, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        way()
        passes += 1
    return {"rate": passes * _IMAGES / elapsed}


def tables(blocks: Blocks) -> list[Table]:
    rows = [(way, spread(column(blocks, way, "rate")), spread(ratios(blocks, way, _ONE), 2)) for way in blocks[0]]
    return [Table((LENET, "images/s", f"÷ {_ONE}"), rows)]
