"""The bound engine: on the CPU's own memory, and on a pretended GPU that does everything as late as it may."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafaga import bundle as bundles
from rafaga.errors import DeviceError, DeviceMemoryError
from rafaga.server.engines.device_memory import CudaMemory, HostMemory
from rafaga.server.engines.onnxruntime import Golden, create_session
from rafaga.server.engines.pipelined import SLOTS, BoundEngine, Lane, PaddedEngine, fits
from rafaga.server.engines.shared_lock import Gate
from rafaga.server.scheduling.job import Job, Part
from tests.bundles import classify, forecast, publish_backbone, publish_classifier, publish_forecaster
from tests.unit.server.fake_gpu import FakeCudart, FakeGpuSession

BUCKETS = (1, 2, 4, 8)


def images(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 28, 28, 1), dtype=np.uint8)


def part(*arrays: np.ndarray, start: int = 0, stop: int | None = None) -> Part:
    job = Job(arrays, lambda *_: None, lambda _: None)
    return Part(job, start, job.rows if stop is None else stop)


class Fixture:
    """A classifier, a forecaster and what they run on; `close` looks whether everything was given back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cudart = FakeCudart()
        self.session: FakeGpuSession | None = None
        self.engines: list[BoundEngine] = []

    def bundle(self, publish: Callable[[Path], Path]) -> tuple[bundles.Bundle, bytes, Golden]:
        path = publish(self.folder)
        bundle = bundles.load(path)
        return bundle, (path / "model.onnx").read_bytes(), Golden.load(bundle, path / bundles.GOLDEN)

    def on_gpu(
        self,
        publish: Callable[[Path], Path] = publish_classifier,
        cpu_inputs: tuple[str, ...] = (),
        graphs: bool = False,
    ) -> BoundEngine:
        bundle, model, _ = self.bundle(publish)
        memory = CudaMemory(self.cudart.cuda())
        self.session = FakeGpuSession(create_session(model, 1), self.cudart, memory.stream, cpu_inputs, graphs)
        try:
            return self._kept(BoundEngine(bundle, self.session, memory, BUCKETS))
        except DeviceMemoryError:
            memory.close()
            raise

    def on_cpu(self, publish: Callable[[Path], Path] = publish_classifier) -> BoundEngine:
        bundle, model, _ = self.bundle(publish)
        return self._kept(BoundEngine(bundle, create_session(model, 1), HostMemory(), BUCKETS, exact=True))

    def _kept(self, engine: BoundEngine) -> BoundEngine:
        self.engines.append(engine)
        return engine


@pytest.fixture
def fixture(tmp_path: Path) -> Iterator[Fixture]:
    fixture = Fixture(tmp_path)
    yield fixture
    for engine in fixture.engines:
        assert engine.close()
    cudart = fixture.cudart
    assert (cudart.memory, cudart.locked, cudart.streams, cudart.events) == ({}, {}, {}, {}), "everything is given back"


@pytest.fixture(params=["cpu", "gpu"])
def engine(request: pytest.FixtureRequest, fixture: Fixture) -> BoundEngine:
    return fixture.on_cpu() if request.param == "cpu" else fixture.on_gpu()


class TestRows:
    @pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8])
    def test_answers_are_those_of_the_rows(self, engine: BoundEngine, rows: int) -> None:
        image = images(rows)
        (got,) = engine.run((image,))
        np.testing.assert_allclose(got, classify(image), atol=1e-6)

    def test_more_rows_than_the_largest_bucket(self, engine: BoundEngine) -> None:
        image = images(19)
        (got,) = engine.run((image,))
        np.testing.assert_allclose(got, classify(image), atol=1e-6)

    def test_parts_of_jobs(self, engine: BoundEngine) -> None:
        a, b = images(3, 1), images(4, 2)
        (got,) = engine.finish(engine.begin([part(a), part(b, start=1, stop=3)]))
        np.testing.assert_allclose(got, classify(np.concatenate((a, b[1:3]))), atol=1e-6)

    def test_two_batches_under_way(self, engine: BoundEngine) -> None:
        """The next batch is written while the one before it has not run: they must not share a buffer."""
        batches = [images(rows, rows) for rows in (3, 8, 1, 5, 8, 2)]
        flying = [engine.begin([part(batches[0])])]
        for at, batch in enumerate(batches[1:]):
            flying.append(engine.begin([part(batch)]))
            (got,) = engine.finish(flying.pop(0))
            np.testing.assert_allclose(got, classify(batches[at]), atol=1e-6)
        (got,) = engine.finish(flying.pop())
        np.testing.assert_allclose(got, classify(batches[-1]), atol=1e-6)

    def test_answers_stay_when_the_buffers_are_used_again(self, engine: BoundEngine) -> None:
        first, second = images(2, 1), images(2, 2)
        (got,) = engine.run((first,))
        kept = got.copy()
        for _ in range(2 * SLOTS):
            engine.run((second,))
        assert (got == kept).all()

    @settings(derandomize=True, deadline=None, max_examples=30)
    @given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=6))
    def test_any_order_of_sizes(self, tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
        fixture = Fixture(tmp_path_factory.mktemp("any"))
        engine = fixture.on_gpu()
        for at, rows in enumerate(sizes):
            (got,) = engine.run((images(rows, at),))
            np.testing.assert_allclose(got, classify(images(rows, at)), atol=1e-6)
        assert engine.close()


class TestPadding:
    @pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
    def test_a_device_sees_buckets_only(self, fixture: Fixture, rows: int, bucket: int) -> None:
        fixture.on_gpu().run((images(rows),))
        assert fixture.session is not None
        assert fixture.session.shapes == [((bucket, 28, 28, 1),)]

    def test_the_cpu_computes_no_row_in_vain(self, fixture: Fixture) -> None:
        engine = fixture.on_cpu()
        engine.run((images(3),))
        assert list(engine._slots[0].bindings) == [((3, 28, 28, 1),)]

    def test_what_is_padded_with_is_as_valid_as_the_rest(self, fixture: Fixture) -> None:
        """Zeros as a series' length would be none: an index before its beginning."""
        engine = fixture.on_gpu(publish_forecaster)
        history, length = np.arange(15, dtype=np.float32).reshape(3, 5), np.array([5, 4, 3], np.int64)
        engine.run((history, length))
        view = engine._slots[0].inputs[1].view((4,), np.dtype(np.int64))
        assert view.tolist() == [5, 4, 3, 3]

    def test_bindings_are_made_once(self, fixture: Fixture) -> None:
        engine = fixture.on_gpu()
        for _ in range(6):
            engine.run((images(3),))
        assert [len(slot.bindings) for slot in engine._slots] == [1, 1]


class TestFreeDimensions:
    @pytest.mark.parametrize("device", ["cpu", "gpu"])
    def test_series_of_different_lengths(self, fixture: Fixture, device: str) -> None:
        engine = fixture.on_cpu(publish_forecaster) if device == "cpu" else fixture.on_gpu(publish_forecaster)
        series = [np.arange(n, dtype=np.float32)[None] + n for n in (3, 40, 7)]
        parts = [part(s, np.array([s.shape[1]], np.int64)) for s in series]
        for _ in range(3):  # through both slots, whose buffers must grow first
            (got,) = engine.finish(engine.begin(parts))
            np.testing.assert_allclose(got, np.stack([forecast(s[0]) for s in series]), rtol=1e-5)

    def test_nothing_is_left_of_a_longer_series(self, fixture: Fixture) -> None:
        engine = fixture.on_gpu(publish_forecaster)
        long, short = np.full((2, 9), 7, np.float32), np.array([[1, 2], [3, 4]], np.float32)
        for _ in range(SLOTS):
            engine.run((long, np.array([9, 9], np.int64)))
        (got,) = engine.finish(
            engine.begin([part(short[:1], np.array([2])), part(np.array([[5, 6, 7]], np.float32), np.array([3]))])
        )
        np.testing.assert_allclose(got[0], forecast(short[0]), rtol=1e-5)

    def test_which_models_fit(self, fixture: Fixture) -> None:
        assert fits(fixture.bundle(publish_classifier)[0])
        assert fits(fixture.bundle(publish_forecaster)[0])
        assert not fits(fixture.bundle(publish_backbone)[0]), "its maps are as large as the image"


class TestOnTheHost:
    def test_an_input_that_the_cpu_reads_is_bound_there(self, fixture: Fixture) -> None:
        engine = fixture.on_gpu(publish_forecaster, cpu_inputs=("length",))
        assert not engine.resident
        for values in ([1.0, 2.0, 3.0], [9.0, 8.0, 7.0], [4.0, 4.0, 5.0]):
            history = np.array([values], np.float32)
            (got,) = engine.run((history, np.array([3], np.int64)))
            np.testing.assert_allclose(got[0], forecast(history[0]), rtol=1e-5)

    def test_nothing_waits_for_its_upload(self, fixture: Fixture) -> None:
        engine = fixture.on_gpu(publish_forecaster, cpu_inputs=("length",))
        fixture.cudart.calls.clear()
        engine.run((np.ones((1, 3), np.float32), np.array([3], np.int64)))
        assert fixture.cudart.calls.count("cudaMemcpyAsync") == 2  # history up, quantiles down


class TestGraphs:
    def test_they_are_kept_where_they_win(self, fixture: Fixture) -> None:
        engine = fixture.on_gpu(graphs=True)
        session = fixture.session
        assert session is not None
        slow = threading.Event()
        session.plain_delay = lambda: slow.wait(0.005) and None
        golden = fixture.bundle(publish_classifier)[2]
        assert engine.try_graphs(golden, Gate()) == BUCKETS
        assert len(session.captured) == SLOTS * len(BUCKETS), "one for each pair of addresses"
        for seed in range(5):
            image = images(5, seed)
            (got,) = engine.run((image,))
            np.testing.assert_allclose(got, classify(image), atol=1e-6)

    def test_they_are_left_where_they_lose(self, fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = fixture.on_gpu(graphs=True)
        monkeypatch.setattr(engine, "seconds", lambda *_: 1e-3)
        assert engine.try_graphs(fixture.bundle(publish_classifier)[2], Gate()) == ()
        (got,) = engine.run((images(3),))
        np.testing.assert_allclose(got, classify(images(3)), atol=1e-6)

    def test_a_model_that_cannot_be_captured(self, fixture: Fixture) -> None:
        engine = fixture.on_gpu(graphs=False)
        with pytest.raises(RuntimeError, match="CaptureUnsupported"):
            engine.try_graphs(fixture.bundle(publish_classifier)[2], Gate())


class TestGate:
    def test_a_capture_waits_for_what_is_under_way_and_nobody_begins_beside_it(self, fixture: Fixture) -> None:
        engine, gate = fixture.on_gpu(), Gate()
        engine.join(gate)
        hold = threading.Event()
        engine._lane.post(hold.wait)
        flight = engine.begin([part(images(2))])
        captured = threading.Event()

        def capture() -> None:
            with gate.alone():
                captured.set()
                assert hold.is_set(), "the batch was under way"

        capturing = threading.Thread(target=capture)
        capturing.start()
        assert not captured.wait(0.05)
        hold.set()
        capturing.join(30)
        assert captured.is_set()
        (got,) = engine.finish(flight)
        np.testing.assert_allclose(got, classify(images(2)), atol=1e-6)

    @pytest.mark.parametrize("function", ["cudaMemcpyAsync", "cudaEventRecord", "cudaEventSynchronize"])
    def test_a_batch_that_fails_leaves(self, fixture: Fixture, function: str) -> None:
        engine, gate = fixture.on_gpu(), Gate()
        engine.join(gate)
        fixture.cudart.refuses[function] = 700
        with pytest.raises(DeviceError, match=function):
            engine.run((images(1),))
        fixture.cudart.refuses.clear()
        with gate.alone(0.1):
            pass


class TestEnd:
    def test_a_run_that_fails_gives_its_slot_back(self, fixture: Fixture) -> None:
        engine = fixture.on_gpu()
        fixture.cudart.refuses["cudaMemcpyAsync"] = 700
        for _ in range(2 * SLOTS):
            with pytest.raises(Exception, match=r"cudaMemcpyAsync: an error \(700\)"):
                engine.run((images(1),))
        fixture.cudart.refuses.clear()
        (got,) = engine.run((images(1),))
        np.testing.assert_allclose(got, classify(images(1)), atol=1e-6)

    def test_what_does_not_fit_leaves_nothing_behind(self, fixture: Fixture) -> None:
        fixture.cudart.total = 10_000
        with pytest.raises(DeviceMemoryError, match="out of memory"):
            fixture.on_gpu()  # the fixture looks whether everything was given back

    def test_a_closed_engine_runs_nothing(self, fixture: Fixture) -> None:
        engine = fixture.on_gpu()
        closed: list[bool] = []
        engine.on_close(lambda: closed.append(True))
        assert engine.close()
        assert closed == [True]
        assert engine.close()
        assert closed == [True], "once"

    def test_terminated(self, fixture: Fixture) -> None:
        engine = fixture.on_cpu()
        engine.terminate()
        with pytest.raises(Exception, match="terminate"):
            engine.run((images(1),))

    def test_under_a_run_that_does_not_end_nothing_is_taken_away(self, fixture: Fixture) -> None:
        engine = fixture.on_gpu()
        hold = threading.Event()
        engine._lane.post(hold.wait)
        assert not engine.close(0.01)
        assert fixture.cudart.memory, "the run may still write there"
        hold.set()


class TestPaddedEngine:
    def test_outputs_of_unknown_shape(self, fixture: Fixture) -> None:
        bundle, model, golden = fixture.bundle(publish_backbone)
        memory = HostMemory()
        engine = PaddedEngine(bundle, create_session(model, 1), memory, BUCKETS)
        assert golden.inputs[0].shape[0] >= 1
        for rows in (1, 3, 5, 11):
            inputs = golden.tiled(rows)
            expected = create_session(model, 1).run(None, {"image": inputs[0]})
            for got, want in zip(engine.run(inputs), expected, strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-5)
        assert engine.close()


class TestLane:
    def test_everything_happens_in_one_thread_in_order(self) -> None:
        lane = Lane("test")
        seen: list[tuple[int, int]] = []
        futures = [lane.post(lambda n=n: seen.append((n, threading.get_ident()))) for n in range(20)]  # type: ignore[misc]
        for future in futures:
            future.result(5)
        assert [n for n, _ in seen] == list(range(20))
        assert {thread for _, thread in seen} == {lane._thread.ident}
        assert lane.close(5)

    def test_errors_go_to_who_waits(self) -> None:
        lane = Lane("test")
        failing = lane.post(lambda: 1 // 0)
        assert lane.post(lambda: 2).result(5) == 2
        with pytest.raises(ZeroDivisionError):
            failing.result(5)
        assert lane.close(5)


def test_onnx_runtime_says_where_its_inputs_are_expected(tmp_path: Path) -> None:
    """The names that `_on_host` goes by."""
    session = create_session((publish_classifier(tmp_path) / "model.onnx").read_bytes(), 1)
    assert isinstance(session, ort.InferenceSession)
    assert [info.name for info in session.get_input_memory_infos()] == ["Cpu"]
    assert [info.name for info in session.get_output_memory_infos()] == ["Cpu"]
