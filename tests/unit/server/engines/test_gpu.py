"""Models on GPUs: how they are loaded, verified, refused and released. CPU sessions take the place of the GPU's."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from rafaga import bundle as bundles
from rafaga.errors import BundleError, DeviceError, DeviceMemoryError
from rafaga.server.config.device import Device, DeviceKind
from rafaga.server.config.per_model import PerModel
from rafaga.server.config.settings import Config
from rafaga.server.engines.contract import Engine, run
from rafaga.server.engines.devices import Gpu
from rafaga.server.engines.gpu import GpuDevice
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace
from rafaga.server.engines.onnxruntime import create_session
from rafaga.server.engines.providers import SessionSettings
from rafaga.server.engines.selection import Placement
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository.loader import Loader
from rafaga.server.scheduling.batcher import BatchPolicy
from tests import plain
from tests.bundles import EVERY_TASK, classify, publish_classifier
from tests.unit.server.engines.test_selection import model_of

CUDA, TENSORRT = Device(DeviceKind.CUDA), Device(DeviceKind.TENSORRT)


class FakeSession:
    """Runs on the CPU. spoiled: its outputs are wrong. fails: so do all runs."""

    def __init__(self, session: ort.InferenceSession, spoiled: bool) -> None:
        self._session = session
        self._spoiled = spoiled
        self.fails = False
        self.shapes: list[tuple[int, ...]] = []

    def run(self, names: Any, feed: dict[str, np.ndarray], options: ort.RunOptions) -> list[np.ndarray]:
        if self.fails:
            raise RuntimeError("CUDA failure 700: an illegal memory access")
        self.shapes.append(next(iter(feed.values())).shape)
        outputs: list[np.ndarray] = self._session.run(names, feed, options)
        return [output * 0 - 9 if self._spoiled else output for output in outputs]


class Machine:
    """One GPU. `settings` are those of all sessions that were made on it; the engines that it loads end with the test.
    fails: what creating a session raises."""

    def __init__(self) -> None:
        self.settings: list[SessionSettings] = []
        self.shapes: list[tuple[int, ...]] = []
        self.alive = weakref.WeakSet[FakeSession]()
        self.engines: list[Engine] = []
        self.fails: Exception | None = None
        self.spoils: Callable[[SessionSettings], bool] = lambda _: False

    def create(self, model: bytes, device: Device, settings: SessionSettings) -> FakeSession:
        assert not self.alive, "the memory of one session is free before the next is made"
        self.settings.append(settings)
        if self.fails is not None:
            raise self.fails
        session = FakeSession(create_session(model, 1), self.spoils(settings))
        self.alive.add(session)
        self.shapes = session.shapes
        return session

    def placement(self, device: Device = CUDA, **given: Any) -> Placement:
        settings = Config.of(**given).engines
        gpu = GpuDevice(Gpu(0, "NVIDIA Pretend", (9, 0)), settings, self.create, lambda: ("tensorrt 1",))
        return Placement((device,), settings, gpus={0: gpu})

    def load(self, folder: Path, device: Device = CUDA, rows: int = 8, **settings: Any) -> Engine:
        self.engines.append(self.placement(**settings).load(device, model_of(folder, rows)).engine)
        return self.engines[-1]

    def loader(self, device: Device = CUDA, **settings: Any) -> Loader:
        def load(placement: Placement, device: Device, model: ModelToPlace) -> LoadedEngine:
            loaded = placement.load(device, model)
            self.engines.append(loaded.engine)
            return loaded

        policy, placement = BatchPolicy(max_queue_wait_s=60), self.placement(device, **settings)
        return Loader(policy, 8, PerModel(None), placement, Metrics(), engine_factory=load)


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Sessions must be released when their engine closes, not when the garbage is collected."""
    gc.disable()
    machine = Machine()
    yield machine
    gc.enable()
    for engine in machine.engines:
        assert engine.close()
    assert not machine.alive


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publish_classifier(tmp_path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_answers(machine: Machine, folder: Path) -> None:
    engine = machine.load(folder)
    image = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
    np.testing.assert_allclose(np.float32(run(engine, (image,))[0]), classify(image), atol=1e-6)
    assert machine.shapes[-1] == (8, 28, 28, 1), "padded to a bucket"
    assert engine.depth == 2


@pytest.mark.parametrize("publish", EVERY_TASK)
def test_every_kind_of_model(machine: Machine, tmp_path: Path, publish: Callable[[Path], Path]) -> None:
    path = publish(tmp_path)
    assert machine.loader().load(path, bundles.load(path)).max_batch_size == 8


@pytest.mark.parametrize(
    ("configured", "rows", "buckets"),
    [("", 8, {1, 2, 4, 8}), ("", 6, {1, 2, 4, 6}), ("2,6,99", 8, {2, 6, 8}), ("16", 1, {1})],
)
def test_every_bucket_runs_at_load(
    machine: Machine, folder: Path, configured: str, rows: int, buckets: set[int]
) -> None:
    machine.load(folder, rows=rows, batch_buckets=configured)
    assert {shape[0] for shape in machine.shapes} == buckets


def test_the_limit_of_a_model_is_that_of_its_arena(machine: Machine, folder: Path) -> None:
    machine.load(folder, gpu_model_memory_mib="100,digits=300,other=200")
    assert machine.settings[0].memory_mib == 300


def test_a_run_that_fails_holds_no_session(machine: Machine, folder: Path) -> None:
    engine = machine.load(folder)
    next(iter(machine.alive)).fails = True
    with pytest.raises(RuntimeError, match="700") as kept:
        run(engine, (np.zeros((1, 28, 28, 1), np.uint8),))
    assert engine.close()
    assert not machine.alive
    assert kept.value.__traceback__ is not None, "the error is still in use"


class TestTensorRt:
    def test_its_settings(self, machine: Machine, folder: Path, cache: Path, caplog: Any) -> None:
        with caplog.at_level(logging.INFO):
            machine.load(folder, TENSORRT, tensorrt_cache=cache)
        (settings,) = machine.settings  # one: TensorRT may take minutes for each
        assert settings.cache is not None
        assert settings.cache.parent == cache
        assert "TensorRT builds the model: this may take minutes" in [record.message for record in caplog.records]
        seen = [shape[0] for shape in machine.shapes]
        assert seen[:2] == [8, 1], "the extremes first: sizes between them need no build of their own"

    def test_a_model_that_takes_no_batches(self, machine: Machine, tmp_path: Path, cache: Path) -> None:
        file = plain.publish(tmp_path, "whole", plain.identity("float32", (3, 2)))
        machine.loader(TENSORRT, tensorrt_cache=cache).load_plain(file.parent, "whole", 1)
        assert machine.shapes[0] == (3, 2)


class TestGoldenOutputs:
    @pytest.mark.parametrize(("device", "tf32"), [(CUDA, False), (TENSORRT, True)], ids=str)
    def test_a_model_that_is_rounded_too_far_loads_again(
        self, machine: Machine, folder: Path, cache: Path, device: Device, tf32: bool, caplog: Any
    ) -> None:
        """In full precision, and from TensorRT to CUDA."""
        machine.spoils = lambda settings: settings == machine.settings[0]
        with caplog.at_level(logging.INFO):
            machine.load(folder, device, tensorrt_cache=cache)
        first, second = machine.settings
        assert (first.tf32, second.tf32) == (True, tf32)
        assert (first.cache is not None, second.cache) == (device == TENSORRT, None)
        assert "golden outputs differ too much, loading again: golden outputs differ" in caplog.text
        record = [r for r in caplog.records if r.message == "model on the GPU"][-1]
        assert (record.device, record.tf32) == ("cuda:0", tf32)

    def test_answers_that_stay_wrong_are_refused(self, machine: Machine, folder: Path) -> None:
        """A broken bundle is broken everywhere: it does not fall back to the CPU."""
        machine.spoils = lambda _: True
        with pytest.raises(BundleError, match="golden outputs differ"):
            machine.loader(device_fallback="cpu").load(folder, bundles.load(folder))

    def test_a_plain_model_is_not_rounded(self, machine: Machine, tmp_path: Path) -> None:
        file = plain.publish(tmp_path, "plain", plain.scaled(2))
        machine.loader().load_plain(file.parent, "plain", 1)
        assert [settings.tf32 for settings in machine.settings] == [False]


class TestFallback:
    @pytest.mark.parametrize(
        ("device", "cause", "error", "message"),
        [
            (CUDA, "BFCArena: Failed to allocate memory for", DeviceMemoryError, "cuda:0 ran out of memory"),
            (CUDA, "CUDA failure 209: no kernel", DeviceError, "digits: ONNX Runtime does not run the model on cuda"),
            (TENSORRT, "failed to create engine", DeviceError, "digits: ONNX Runtime does not run the model on tens"),
        ],
    )
    def test_a_model_that_the_gpu_fails_on(
        self,
        machine: Machine,
        folder: Path,
        cache: Path,
        device: Device,
        cause: str,
        error: type[DeviceError],
        message: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """It is refused, or served on the CPU with a warning where that is allowed."""
        machine.fails = RuntimeError(cause)
        with pytest.raises(error, match=message):
            machine.loader(device, tensorrt_cache=cache).load(folder, bundles.load(folder))
        machine.loader(device, tensorrt_cache=cache, device_fallback="cpu").load(folder, bundles.load(folder))
        assert f"FALLEN BACK to the CPU, as device_fallback allows: {message}" in caplog.text

    def test_a_defect_of_the_model_is_a_bundle_error(self, machine: Machine, folder: Path) -> None:
        machine.fails = RuntimeError("Could not find an implementation for Foo(1)")
        with pytest.raises(BundleError, match="digits: ONNX Runtime does not run the model on cuda:0: Could not") as e:
            machine.load(folder)
        assert not isinstance(e.value, DeviceError)
