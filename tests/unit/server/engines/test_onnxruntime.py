"""Batches of every size, with a fake session."""

from __future__ import annotations

import numpy as np

from rafaga.bundle import TensorSpec
from rafaga.plain_model import PlainModel
from rafaga.server.engines.batched import SessionEngine
from rafaga.server.engines.contract import run, run_in_batches
from rafaga.server.engines.loading import Samples, measured
from rafaga.server.scheduling.latency import DISPATCH_S


def described() -> PlainModel:
    x, y = (TensorSpec(name=name, dtype="float32", shape=(None, None)) for name in "xy")
    return PlainModel("model", 1, (x,), (y,), 8)


class FakeSession:
    """Adds one; records the sizes of its batches."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def run(self, output_names: object, input_feed: dict[str, np.ndarray], options: object = None) -> list[np.ndarray]:
        assert output_names == ("y",)
        self.rows.append(len(input_feed["x"]))
        return [input_feed["x"] + 1]


def test_every_bucket_is_warm_before_it_is_measured() -> None:
    session = FakeSession()
    table = measured(SessionEngine(described(), session), Samples((np.zeros((3, 2)),)), (1, 2, 4, 6))
    for rows in table.buckets:
        assert session.rows.count(rows) >= 3
        assert table.predict(rows) > DISPATCH_S


def test_batches_are_padded_to_buckets() -> None:
    session = FakeSession()
    (got,) = run(SessionEngine(described(), session, buckets=(1, 4)), (np.zeros((3, 2)),))
    assert (session.rows, got.shape) == ([4], (3, 2))


def test_more_rows_than_a_batch_holds() -> None:
    session = FakeSession()
    (got,) = run_in_batches(SessionEngine(described(), session), (np.arange(10.0).reshape(5, 2),), 2)
    assert session.rows == [2, 2, 1]
    np.testing.assert_array_equal(got, np.arange(1.0, 11.0).reshape(5, 2))


def test_tiling() -> None:
    tiled = Samples((np.arange(6).reshape(3, 2), np.array([7, 8, 9]))).tiled(5)
    assert tiled[0].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert tiled[1].tolist() == [7, 8, 9, 7, 8]
