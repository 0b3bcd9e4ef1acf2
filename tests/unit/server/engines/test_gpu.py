"""Models on GPUs: how they are loaded, verified, refused and released. CPU sessions take the place of the GPU's."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Precision
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
from rafaga.server.engines.runtimes import fastest_on_gpu
from rafaga.server.engines.selection import Placement
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository.loader import Loader
from rafaga.server.scheduling.batcher import BatchPolicy
from tests.bundles import (
    classify,
    publish_backbone,
    publish_classifier,
    publish_detector,
    publish_forecaster,
    publish_sequence_model,
)
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
    """One GPU. `settings` are those of all sessions that were made on it."""

    def __init__(self) -> None:
        self.settings: list[SessionSettings] = []
        self.shapes: list[tuple[int, ...]] = []
        self.alive = weakref.WeakSet[FakeSession]()
        self.engines: list[Engine] = []
        self.fails: Callable[[SessionSettings], None] = lambda _: None
        self.spoils: Callable[[SessionSettings], bool] = lambda _: False

    def create(self, model: bytes, device: Device, settings: SessionSettings) -> FakeSession:
        assert not self.alive, "the memory of one session is free before the next is made"
        self.settings.append(settings)
        self.fails(settings)
        session = FakeSession(create_session(model, 1), self.spoils(settings))
        self.alive.add(session)
        self.shapes = session.shapes
        return session

    def placement(self, device: Device = CUDA, **given: Any) -> Placement:
        settings = Config.of(**given).engines
        gpu = GpuDevice(Gpu(0, "NVIDIA Pretend", (9, 0)), settings, self.create, lambda: ("tensorrt 1",))
        return Placement((device,), settings, gpus={0: gpu})

    def load(self, folder: Path, device: Device = CUDA, **settings: Any) -> Engine:
        return self.placement(**settings).load(device, model_of(folder)).engine

    def served(self, placement: Placement) -> Loader:
        """Keeps the engines that it loads in `engines`."""

        def load(placement: Placement, device: Device, model: ModelToPlace) -> LoadedEngine:
            loaded = placement.load(device, model)
            self.engines.append(loaded.engine)
            return loaded

        return Loader(BatchPolicy(max_queue_wait_s=60), 8, PerModel(None), placement, Metrics(), engine_factory=load)


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


class TestGpu:
    def test_answers(self, machine: Machine, folder: Path) -> None:
        engine = machine.load(folder)
        image = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
        np.testing.assert_allclose(np.float32(run(engine, (image,))[0]), classify(image), atol=1e-6)
        assert machine.shapes[-1] == (8, 28, 28, 1), "padded to a bucket"
        assert engine.depth == 2
        assert engine.close()

    @pytest.mark.parametrize(
        "publish",
        [publish_classifier, publish_forecaster, publish_backbone, publish_detector, publish_sequence_model],
    )
    def test_every_kind_of_model(self, machine: Machine, tmp_path: Path, publish: Callable[[Path], Path]) -> None:
        path = publish(tmp_path)
        model = machine.served(machine.placement()).load(path, bundles.load(path))
        assert model.max_batch_size == 8
        model.close()

    @pytest.mark.parametrize(
        ("configured", "rows", "buckets"),
        [("", 8, {1, 2, 4, 8}), ("", 6, {1, 2, 4, 6}), ("2,6,99", 8, {2, 6, 8}), ("16", 1, {1})],
    )
    def test_every_bucket_runs_at_load(
        self, machine: Machine, folder: Path, configured: str, rows: int, buckets: set[int]
    ) -> None:
        engine = machine.placement(batch_buckets=configured).load(CUDA, model_of(folder, rows)).engine
        assert {shape[0] for shape in machine.shapes} == buckets
        assert engine.close()

    def test_the_limit_of_a_model_is_that_of_its_arena(self, machine: Machine, folder: Path) -> None:
        assert machine.load(folder, gpu_model_memory_mib="100,digits=300,other=200").close()
        assert machine.settings[0].memory_mib == 300

    def test_a_run_that_fails_holds_no_session(self, machine: Machine, folder: Path) -> None:
        engine = machine.load(folder)
        next(iter(machine.alive)).fails = True
        with pytest.raises(RuntimeError, match="700") as kept:
            run(engine, (np.zeros((1, 28, 28, 1), np.uint8),))
        assert engine.close()
        assert not machine.alive
        assert kept.value.__traceback__ is not None, "the error is still in use"


class TestTensorRt:
    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        return tmp_path / "cache"

    def test_its_settings(self, machine: Machine, folder: Path, cache: Path, caplog: Any) -> None:
        with caplog.at_level(logging.INFO):
            engine = machine.load(folder, TENSORRT, tensorrt_cache=cache)
        (settings,) = machine.settings  # one: TensorRT may take minutes for each
        assert settings.cache is not None
        assert settings.cache.parent == cache
        assert "TensorRT builds the model: this may take minutes" in [record.message for record in caplog.records]
        seen = [shape[0] for shape in machine.shapes]
        assert seen[:2] == [8, 1], "the extremes first: sizes between them need no build of their own"
        assert engine.close()

    def test_a_model_that_takes_no_batches(self, machine: Machine, tmp_path: Path, cache: Path) -> None:
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 2]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "whole", [x], [y])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        folder = tmp_path / "whole" / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        served = machine.served(machine.placement(TENSORRT, tensorrt_cache=cache)).load_plain(folder, "whole", 1)
        assert machine.shapes[0] == (3, 2)
        served.close()

    def test_wrong_answers_move_the_model_to_cuda(
        self, machine: Machine, folder: Path, cache: Path, caplog: Any
    ) -> None:
        machine.spoils = lambda settings: settings.cache is not None
        with caplog.at_level(logging.INFO):
            engine = machine.load(folder, TENSORRT, tensorrt_cache=cache)
        assert [settings.cache is not None for settings in machine.settings] == [True, False]
        assert "golden outputs differ too much, loading again: golden outputs differ" in caplog.text
        record = [r for r in caplog.records if r.message == "model on the GPU"][-1]
        assert (record.device, record.tf32) == ("cuda:0", True)
        assert engine.close()

    @pytest.fixture
    def unbuildable(self, machine: Machine) -> Machine:
        def fail(_: SessionSettings) -> None:
            raise RuntimeError("TensorRT EP failed to create engine from network")

        machine.fails = fail
        return machine

    def test_a_model_that_it_does_not_build_is_refused(self, unbuildable: Machine, folder: Path, cache: Path) -> None:
        loader = unbuildable.served(unbuildable.placement(TENSORRT, tensorrt_cache=cache))
        with pytest.raises(DeviceError, match=r"does not run the model on tensorrt.*failed to create engine"):
            loader.load(folder, bundles.load(folder))

    def test_or_runs_on_the_cpu_where_that_is_allowed(
        self, unbuildable: Machine, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        placement = unbuildable.placement(TENSORRT, tensorrt_cache=cache, device_fallback="cpu")
        model = unbuildable.served(placement).load(folder, bundles.load(folder))
        assert "FALLEN BACK to the CPU, as device_fallback allows: digits: ONNX Runtime does not run" in caplog.text
        model.close()


class TestGoldenOutputs:
    def test_a_model_that_tf32_rounds_too_far_loads_again(
        self, machine: Machine, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine.spoils = lambda settings: settings.tf32
        with caplog.at_level(logging.WARNING):
            engine = machine.load(folder)
        assert [s.tf32 for s in machine.settings] == [True, False]
        assert "golden outputs differ too much, loading again" in caplog.text
        assert engine.close()

    def test_answers_that_stay_wrong_are_refused(self, machine: Machine, folder: Path) -> None:
        machine.spoils = lambda _: True
        with pytest.raises(BundleError, match="golden outputs differ"):
            machine.load(folder)

    def test_a_plain_model_is_not_rounded(self, machine: Machine, folder: Path) -> None:
        path = folder.parent.parent / "plain" / "1"
        path.mkdir(parents=True)
        (path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
        model = machine.served(machine.placement()).load_plain(path, "plain", 1)
        assert [s.tf32 for s in machine.settings] == [False]
        model.close()


class TestFallback:
    @pytest.mark.parametrize(
        ("cause", "error", "message"),
        [
            ("BFCArena: Failed to allocate memory for requested", DeviceMemoryError, "cuda:0 ran out of memory"),
            (
                "CUDA failure 209: no kernel image is available",
                DeviceError,
                "digits: ONNX Runtime does not run the model",
            ),
        ],
    )
    def test_a_model_that_the_gpu_fails_on(
        self, machine: Machine, folder: Path, cause: str, error: type[DeviceError], message: str, caplog: Any
    ) -> None:
        """It is refused, or served on the CPU with a warning where that is allowed."""

        def fail(_: Any) -> None:
            raise RuntimeError(cause)

        machine.fails = fail
        with pytest.raises(error, match=message):
            machine.served(machine.placement()).load(folder, bundles.load(folder))
        machine.served(machine.placement(device_fallback="cpu")).load(folder, bundles.load(folder))
        assert f"FALLEN BACK to the CPU, as device_fallback allows: {message}" in caplog.text

    def test_a_defect_of_the_model_is_a_bundle_error(self, machine: Machine, folder: Path) -> None:
        def broken(_: Any) -> None:
            raise RuntimeError("Could not find an implementation for Foo(1)")

        machine.fails = broken
        with pytest.raises(BundleError, match="digits: ONNX Runtime does not run the model on cuda:0: Could not") as e:
            machine.load(folder)
        assert not isinstance(e.value, DeviceError)

    def test_a_broken_bundle_is_broken_everywhere(self, machine: Machine, folder: Path) -> None:
        machine.spoils = lambda _: True
        with pytest.raises(BundleError, match="golden outputs differ"):
            machine.served(machine.placement(device_fallback="cpu")).load(folder, bundles.load(folder))


def with_variants(bundle: Bundle, **eligible: bool) -> Bundle:
    full = bundle.variants[0]
    variants = [full] + [
        msgspec.structs.replace(full, precision=Precision(name), file=f"model.{name}.onnx", default_eligible=ok)
        for name, ok in eligible.items()
    ]
    return msgspec.structs.replace(bundle, variants=tuple(variants))


@pytest.mark.parametrize(
    ("eligible", "chosen", "why"),
    [
        ({}, "fp32", "there is no fp16 variant"),
        ({"int8": True}, "fp32", "there is no fp16 variant"),
        ({"fp16": False, "int8": True}, "fp32", "accuracy loss unknown"),
        ({"fp16": True, "int8": True}, "fp16", "kept its accuracy"),
    ],
)
def test_which_variant_a_gpu_serves(folder: Path, eligible: dict[str, bool], chosen: str, why: str) -> None:
    variant, said = fastest_on_gpu(with_variants(bundles.load(folder), **eligible))
    assert variant.precision == chosen
    assert why in said
