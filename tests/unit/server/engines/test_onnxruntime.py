"""The engine with a pretended session: rows into batches and out, golden answers, threads, warm-up."""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafaga import bundle as bundles
from rafaga.bundle import TensorSpec
from rafaga.errors import BundleError
from rafaga.server.engines import onnxruntime as engines
from rafaga.server.engines.onnxruntime import Engine, Golden, Samples, assemble, padding_rows
from rafaga.server.scheduling.job import Arrays, Job, Part
from rafaga.server.scheduling.latency import DISPATCH_S
from tests import plain
from tests.bundles import classify, publish_classifier


@dataclass(frozen=True)
class Described:
    """What the engine asks of a bundle."""

    name: str = "model"
    inputs: tuple[TensorSpec, ...] = (TensorSpec(name="x", dtype="float32", shape=(None, None)),)
    outputs: tuple[TensorSpec, ...] = (TensorSpec(name="y", dtype="float32", shape=(None, None)),)
    max_batch_size: int = 8


class FakeSession:
    """Adds one; remembers the sizes it was asked for."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def run(self, output_names: object, input_feed: dict[str, np.ndarray], options: object = None) -> list[np.ndarray]:
        assert output_names == ("y",)
        self.rows.append(len(input_feed["x"]))
        return [input_feed["x"] + 1]


def part(*arrays: np.ndarray, start: int = 0, stop: int | None = None) -> Part:
    job = Job(arrays, lambda *_: None, lambda _: None)
    return Part(job, start, job.rows if stop is None else stop)


class TestAssemble:
    def test_numbers_that_lie_askew_in_their_request_are_aligned(self) -> None:
        request = b"\0" + np.arange(6, dtype=np.float32).tobytes()
        rows = np.frombuffer(request, np.float32, 6, 1).reshape(2, 3)
        (got,) = assemble([part(rows)])
        assert got.flags.aligned
        np.testing.assert_array_equal(got, rows)

    def test_a_lone_job_is_not_copied(self) -> None:
        rows = np.arange(6.0).reshape(3, 2)
        assert assemble([part(rows)])[0] is rows

    def test_a_part_of_a_job_is_a_view(self) -> None:
        rows = np.arange(6.0).reshape(3, 2)
        (got,) = assemble([part(rows, start=1, stop=3)])
        assert got.base is not None
        assert got.tolist() == [[2, 3], [4, 5]]

    def test_rows_are_joined_in_order(self) -> None:
        a, b, c = np.arange(4.0).reshape(2, 2), np.arange(6.0).reshape(3, 2) + 10, np.full((1, 2), 99.0)
        (got,) = assemble([part(a), part(b, start=1, stop=3), part(c)])
        assert got.tolist() == [[0, 1], [2, 3], [12, 13], [14, 15], [99, 99]]

    def test_every_input_is_joined(self) -> None:
        got = assemble([part(np.ones((1, 2)), np.array([5])), part(np.zeros((2, 2)), np.array([6, 7]))])
        assert [a.shape for a in got] == [(3, 2), (3,)]
        assert got[1].tolist() == [5, 6, 7]

    def test_series_of_different_lengths_are_padded_on_the_right(self) -> None:
        a, b = np.array([[1.0, 2.0, 3.0]], np.float32), np.array([[4.0], [5.0]], np.float32)
        (got,) = assemble([part(a), part(b)])
        assert got.tolist() == [[1, 2, 3], [4, 0, 0], [5, 0, 0]]
        assert got.dtype == np.float32
        assert padding_rows([part(a), part(b)]) == pytest.approx(4 / 3), "two rows of which two thirds are zeros"
        assert padding_rows([part(a), part(a)]) == padding_rows([part(b)]) == 0

    @settings(derandomize=True, deadline=None, max_examples=60)
    @given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=6))
    def test_ragged_rows_come_out_as_they_went_in(self, shapes: list[tuple[int, int, int]]) -> None:
        blocks = [np.full(shape, n + 1, np.int32) for n, shape in enumerate(shapes)]
        (got,) = assemble([part(block) for block in blocks])
        at = 0
        for block in blocks:
            rows, height, width = block.shape
            np.testing.assert_array_equal(got[at : at + rows, :height, :width], block)
            assert got[at : at + rows].sum() == block.sum(), "the rest is zero"
            at += rows
        assert at == len(got)


class TestEngine:
    def test_names_and_arrays_meet(self) -> None:
        (got,) = Engine(Described(), FakeSession()).run((np.zeros((2, 3), np.float32),))
        assert (got == 1).all()

    def test_a_missing_input_is_no_silent_one(self) -> None:
        with pytest.raises(ValueError, match="argument"):
            Engine(Described(), FakeSession()).run((np.zeros((1, 1)), np.zeros((1, 1))))

    def test_outputs_with_rows_missing(self) -> None:
        session = FakeSession()
        session.run = lambda _, feed, __: [feed["x"][1:]]  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="expected 3 rows in every output"):
            Engine(Described(), session).run((np.zeros((3, 1)),))

    def test_a_model_without_batches_gets_its_whole_input(self) -> None:
        seen: list[tuple[int, ...]] = []
        session = FakeSession()

        def run(_: object, feed: dict[str, np.ndarray], __: object) -> list[np.ndarray]:
            seen.append(feed["x"].shape)
            return [feed["x"].sum(0)]

        session.run = run  # type: ignore[method-assign]
        (got,) = Engine(Described(max_batch_size=0), session).run((np.ones((1, 4, 2)),))
        assert seen == [(4, 2)]
        assert got.tolist() == [[4.0, 4.0]]

    def test_every_bucket_is_warmed_before_it_is_measured(self) -> None:
        session = FakeSession()
        table = Engine(Described(), session).warm_up(Samples((np.zeros((3, 2)),)), 6)
        assert table.buckets == (1, 2, 4, 6)
        for rows in table.buckets:
            assert session.rows.count(rows) >= 3
            assert table.predict(rows) > DISPATCH_S

    def test_sizes_take_turns_while_they_are_measured(self) -> None:
        """A busy moment of the machine would otherwise fall on one size alone."""
        session = FakeSession()
        Engine(Described(), session).warm_up(Samples((np.zeros((3, 2)),)), 6)
        assert session.rows[:12] == [1, 2, 4, 6] * 3

    def test_a_run_that_does_not_end_can_be_ended(self) -> None:
        spec = (TensorSpec(name="x", dtype="int64", shape=(None,)),)
        described = Described(inputs=spec, outputs=(TensorSpec(name="y", dtype="int64", shape=(None,)),))
        engine = Engine(described, engines.create_session(plain.spinning().SerializeToString(), 1))
        assert engine.run((np.array([3]),))[0].tolist() == [3]
        ends: list[Exception] = []

        def spin() -> None:
            with pytest.raises(Exception, match="terminate") as end:
                engine.run((np.array([10**15]),))
            ends.append(end.value)

        thread = threading.Thread(target=spin)
        thread.start()
        engine.terminate()
        thread.join(30)
        assert len(ends) == 1
        with pytest.raises(Exception, match="terminate"):
            engine.run((np.array([3]),))


class TestThreads:
    """`threads` None: one for models that are quicker than a thread wakes up."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        asked: list[int] = []

        def create(model: bytes, threads: int, spinning: bool = False) -> FakeSession:
            assert model == b"model"
            asked.append(threads)
            return FakeSession()

        monkeypatch.setattr(engines, "create_session", create)
        monkeypatch.setattr(engines, "available_cores", lambda: 4)
        return asked

    samples = Samples((np.zeros((1, 2)),))

    def test_quick_models(self, asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Engine, "_timed", lambda *_: [1e-4])
        Engine.load(Described(), b"model", self.samples, None)
        assert asked == [4, 1]

    def test_large_models(self, asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Engine, "_timed", lambda *_: [1e-2])
        Engine.load(Described(), b"model", self.samples, None)
        assert asked == [4]

    def test_as_many_as_told(self, asked: list[int]) -> None:
        Engine.load(Described(), b"model", self.samples, 3)
        assert asked == [3]


class TestGolden:
    @staticmethod
    def golden(folder: Path) -> tuple[bundles.Bundle, Golden]:
        bundle = bundles.load(folder)
        return bundle, Golden.load(bundle, folder / bundles.GOLDEN)

    def test_a_real_model_gives_its_golden_outputs(self, tmp_path: Path) -> None:
        folder = publish_classifier(tmp_path)
        bundle, golden = self.golden(folder)
        engine = Engine.load(bundle, (folder / "model.onnx").read_bytes(), golden, 1)
        golden.check(engine.run(golden.inputs), 1e-5)
        image = np.random.default_rng(5).integers(0, 256, (7, 28, 28, 1), dtype=np.uint8)
        np.testing.assert_allclose(engine.run((image,))[0], classify(image), atol=1e-6)

    @pytest.mark.parametrize("wrong", ["value", "nan", "shape"])
    def test_other_answers_are_refused(self, tmp_path: Path, wrong: str) -> None:
        _, golden = self.golden(publish_classifier(tmp_path))
        (outputs,) = golden.outputs
        changed = outputs[:, :5] if wrong == "shape" else outputs.copy()
        if wrong != "shape":
            changed[0, 0] = np.nan if wrong == "nan" else outputs[0, 0] + 0.01
        with pytest.raises(BundleError, match="golden outputs"):
            golden.check((changed,), 1e-3)

    def test_differences_within_the_tolerance(self, tmp_path: Path) -> None:
        _, golden = self.golden(publish_classifier(tmp_path))
        golden.check(tuple(o + np.float32(5e-4) for o in golden.outputs), 1e-3)

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        bundle = bundles.load(publish_classifier(tmp_path))
        with pytest.raises(BundleError, match=r"lacks 'output\.probabilities'"):
            Golden(bundle, {"input.image": np.zeros((1, 28, 28, 1), np.uint8)})

    def test_pickles_are_not_opened(self, tmp_path: Path) -> None:
        bundle = bundles.load(publish_classifier(tmp_path))
        file = io.BytesIO()
        np.savez(file, **{"input.image": np.array([object()], dtype=object)}, allow_pickle=True)
        (tmp_path / "evil.npz").write_bytes(file.getvalue())
        with pytest.raises(ValueError, match="allow_pickle"):
            Golden.load(bundle, tmp_path / "evil.npz")

    def test_tiling(self) -> None:
        inputs: Arrays = (np.arange(6).reshape(3, 2), np.array([7, 8, 9]))
        tiled = Samples(inputs).tiled(5)
        assert tiled[0].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
        assert tiled[1].tolist() == [7, 8, 9, 7, 8]


def test_what_onnx_runtime_refuses_is_a_bundle_error() -> None:
    with pytest.raises(BundleError, match="does not run the model"):
        Engine.load(Described(), b"no model", Samples((np.zeros((1, 2)),)), 1)

    @pytest.mark.parametrize(("cores", "seconds", "expected"), [(2, 1e-2, [2]), (2, 1e-4, [2, 1]), (1, 1e-4, [1])])
    def test_beside_others_its_share_at_most(
        self, asked: list[int], monkeypatch: pytest.MonkeyPatch, cores: int, seconds: float, expected: list[int]
    ) -> None:
        monkeypatch.setattr(Engine, "_timed", lambda *_: [seconds])
        Engine.load(Described(), b"model", self.samples, None, cores=cores)
        assert asked == expected
