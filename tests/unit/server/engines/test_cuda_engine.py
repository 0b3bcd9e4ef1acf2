"""CudaEngine on a simulated GPU, which does everything as late as it may; rows on a pipelined CPU engine too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rafaga import bundle as bundles
from rafaga.errors import DeviceMemoryError
from rafaga.server.engines.contract import DEPTH, Engine, run
from rafaga.server.engines.cuda_engine import CudaEngine
from rafaga.server.engines.device_memory import CudaMemory
from rafaga.server.engines.onnxruntime import SessionEngine, create_session
from rafaga.server.repository.golden import Golden
from rafaga.server.scheduling.job import Job, Part
from tests.bundles import classify, forecast, publish_classifier, publish_forecaster
from tests.unit.server.fake_gpu import FakeCudart, FakeGpuSession

assert_close: Any = np.testing.assert_allclose  # typed for numbers; the arrays of engines are of any dtype

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
        self.engines: list[Engine] = []

    def bundle(self, publish: Callable[[Path], Path]) -> tuple[bundles.Bundle, bytes, Golden]:
        path = publish(self.folder)
        bundle = bundles.load(path)
        return bundle, (path / "model.onnx").read_bytes(), Golden.load(bundle, path / bundles.GOLDEN)

    def on_gpu(
        self,
        publish: Callable[[Path], Path] = publish_classifier,
        cpu_inputs: tuple[str, ...] = (),
    ) -> CudaEngine:
        bundle, model, _ = self.bundle(publish)
        memory = CudaMemory(self.cudart.cuda())
        self.session = FakeGpuSession(create_session(model, 1), self.cudart, memory.stream, cpu_inputs)
        try:
            engine = CudaEngine(bundle, self.session, memory, BUCKETS)
        except DeviceMemoryError:
            memory.close()
            raise
        self.engines.append(engine)
        return engine

    def on_cpu(self, publish: Callable[[Path], Path] = publish_classifier) -> SessionEngine:
        bundle, model, _ = self.bundle(publish)
        engine = SessionEngine(bundle, create_session(model, 1), pipelined=True)
        self.engines.append(engine)
        return engine


@pytest.fixture
def fixture(tmp_path: Path) -> Iterator[Fixture]:
    fixture = Fixture(tmp_path)
    yield fixture
    for engine in fixture.engines:
        assert engine.close()
    cudart = fixture.cudart
    assert (cudart.memory, cudart.locked, cudart.streams) == ({}, {}, {}), "everything is given back"


@pytest.fixture(params=["cpu", "gpu"])
def engine(request: pytest.FixtureRequest, fixture: Fixture) -> Engine:
    return fixture.on_cpu() if request.param == "cpu" else fixture.on_gpu()


class TestRows:
    @pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8])
    def test_answers_are_those_of_the_rows(self, engine: Engine, rows: int) -> None:
        image = images(rows)
        (got,) = run(engine, (image,))
        assert_close(got, classify(image), atol=1e-6)

    def test_parts_of_jobs(self, engine: Engine) -> None:
        a, b = images(3, 1), images(4, 2)
        (got,) = engine.submit([part(a), part(b, start=1, stop=3)]).result()
        assert_close(got, classify(np.concatenate((a, b[1:3]))), atol=1e-6)

    def test_two_batches_under_way(self, engine: Engine) -> None:
        """The next batch is written while the one before it has not run: they must not share a buffer."""
        batches = [images(rows, rows) for rows in (3, 8, 1, 5, 8, 2)]
        in_flight = [engine.submit([part(batches[0])])]
        for at, batch in enumerate(batches[1:]):
            in_flight.append(engine.submit([part(batch)]))
            (got,) = in_flight.pop(0).result()
            assert_close(got, classify(batches[at]), atol=1e-6)
        (got,) = in_flight.pop().result()
        assert_close(got, classify(batches[-1]), atol=1e-6)

    def test_answers_stay_when_the_buffers_are_used_again(self, engine: Engine) -> None:
        first, second = images(2, 1), images(2, 2)
        (got,) = run(engine, (first,))
        kept = got.copy()
        for _ in range(2 * DEPTH):
            run(engine, (second,))
        assert (got == kept).all()


class TestPadding:
    @pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
    def test_a_device_sees_buckets_only(self, fixture: Fixture, rows: int, bucket: int) -> None:
        run(fixture.on_gpu(), (images(rows),))
        assert fixture.session is not None
        assert fixture.session.shapes == [((bucket, 28, 28, 1),)]


class TestFreeDimensions:
    @pytest.mark.parametrize("device", ["cpu", "gpu"])
    def test_series_of_different_lengths(self, fixture: Fixture, device: str) -> None:
        on = fixture.on_cpu if device == "cpu" else fixture.on_gpu
        engine: Engine = on(publish_forecaster)
        series = [np.arange(n, dtype=np.float32)[None] + n for n in (3, 40, 7)]
        parts = [part(s, np.array([s.shape[1]], np.int64)) for s in series]
        for _ in range(3):  # through both slots, whose buffers must grow first
            (got,) = engine.submit(parts).result()
            assert_close(got, np.stack([forecast(s[0]) for s in series]), rtol=1e-5)

    def test_nothing_is_left_of_a_longer_series(self, fixture: Fixture) -> None:
        engine = fixture.on_gpu(publish_forecaster)
        long, short = np.full((2, 9), 7, np.float32), np.array([[1, 2], [3, 4]], np.float32)
        for _ in range(DEPTH):
            run(engine, (long, np.array([9, 9], np.int64)))
        (got,) = engine.submit(
            [part(short[:1], np.array([2])), part(np.array([[5, 6, 7]], np.float32), np.array([3]))]
        ).result()
        np.testing.assert_allclose(got[0], forecast(short[0]), rtol=1e-5)


class TestOnTheHost:
    def test_an_input_that_the_cpu_reads_is_bound_there(self, fixture: Fixture) -> None:
        engine = fixture.on_gpu(publish_forecaster, cpu_inputs=("length",))
        for values in ([1.0, 2.0, 3.0], [9.0, 8.0, 7.0], [4.0, 4.0, 5.0]):
            history = np.array([values], np.float32)
            (got,) = run(engine, (history, np.array([3], np.int64)))
            np.testing.assert_allclose(got[0], forecast(history[0]), rtol=1e-5)

    def test_nothing_waits_for_its_upload(self, fixture: Fixture) -> None:
        engine = fixture.on_gpu(publish_forecaster, cpu_inputs=("length",))
        fixture.cudart.calls.clear()
        run(engine, (np.ones((1, 3), np.float32), np.array([3], np.int64)))
        assert fixture.cudart.calls.count("cudaMemcpyAsync") == 2  # history up, quantiles down


class TestEnd:
    def test_a_run_that_fails_gives_its_slot_back(self, fixture: Fixture) -> None:
        engine = fixture.on_gpu()
        fixture.cudart.refuses["cudaMemcpyAsync"] = 700
        for _ in range(2 * DEPTH):
            with pytest.raises(Exception, match=r"cudaMemcpyAsync: an error \(700\)"):
                run(engine, (images(1),))
        fixture.cudart.refuses.clear()
        (got,) = run(engine, (images(1),))
        assert_close(got, classify(images(1)), atol=1e-6)

    def test_what_does_not_fit_leaves_nothing_behind(self, fixture: Fixture) -> None:
        fixture.cudart.total = 10_000
        with pytest.raises(DeviceMemoryError, match="out of memory"):
            fixture.on_gpu()  # the fixture looks whether everything was given back

    def test_terminated(self, fixture: Fixture) -> None:
        engine = fixture.on_cpu()
        engine.terminate()
        with pytest.raises(Exception, match="terminate"):
            run(engine, (images(1),))

    def test_under_a_run_that_does_not_end_nothing_is_released(self, fixture: Fixture) -> None:
        engine = fixture.on_gpu()
        hold = threading.Event()
        assert fixture.session is not None
        fixture.session.before_run = hold.wait
        outputs = engine.submit([part(images(1))])
        assert not engine.close(0.01)
        assert fixture.cudart.memory, "the run may still write there"
        hold.set()
        outputs.result()
