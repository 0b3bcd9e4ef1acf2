"""The engine that computes in the caller's thread, with fake sessions and real ones."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from rafaga.bundle import TensorSpec
from rafaga.plain_model import PlainModel
from rafaga.server.engines.contract import run, run_in_batches
from rafaga.server.engines.loading import Samples, measured
from rafaga.server.engines.onnxruntime import SessionEngine, create_session
from rafaga.server.scheduling.latency import DISPATCH_S
from tests import plain


def described(dtype: str = "float32", shape: tuple[int | None, ...] = (None, None), most: int = 8) -> PlainModel:
    x, y = (TensorSpec(name=name, dtype=dtype, shape=shape) for name in "xy")
    return PlainModel("model", 1, (x,), (y,), most)


class FakeSession:
    """Adds one; records the sizes of its batches."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def run(self, output_names: object, input_feed: dict[str, np.ndarray], options: object = None) -> list[np.ndarray]:
        assert output_names == ("y",)
        self.rows.append(len(input_feed["x"]))
        return [input_feed["x"] + 1]


def test_outputs_with_rows_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession()
    monkeypatch.setattr(session, "run", lambda _, feed, __: [feed["x"][1:]])
    with pytest.raises(ValueError, match="expected 3 rows in every output"):
        run(SessionEngine(described(), session), (np.zeros((3, 1)),))


def test_a_model_without_batches_gets_its_whole_input(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    session = FakeSession()

    def add_up(_: object, feed: dict[str, np.ndarray], __: object) -> list[np.ndarray]:
        seen.append(feed["x"].shape)
        return [feed["x"].sum(0)]

    monkeypatch.setattr(session, "run", add_up)
    (got,) = run(SessionEngine(described(most=0), session), (np.ones((1, 4, 2)),))
    assert seen == [(4, 2)]
    assert got.tolist() == [[4.0, 4.0]]


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


def test_a_closed_engine_runs_nothing() -> None:
    engine = SessionEngine(described(), FakeSession())
    assert engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        run(engine, (np.zeros((1, 2)),))


def test_a_run_without_end_is_terminated() -> None:
    engine = SessionEngine(described("int64", (None,)), create_session(plain.spinning().SerializeToString(), 1))
    assert run(engine, (np.array([3]),))[0].tolist() == [3]
    ends: list[Exception] = []

    def spin() -> None:
        with pytest.raises(Exception, match="terminate") as end:
            run(engine, (np.array([10**15]),))
        ends.append(end.value)

    thread = threading.Thread(target=spin)
    thread.start()
    engine.terminate()
    thread.join(30)
    assert len(ends) == 1
    with pytest.raises(Exception, match="terminate"):
        run(engine, (np.array([3]),))


def test_tiling() -> None:
    tiled = Samples((np.arange(6).reshape(3, 2), np.array([7, 8, 9]))).tiled(5)
    assert tiled[0].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert tiled[1].tolist() == [7, 8, 9, 7, 8]
