"""Models on GPUs: what is measured there, refused and released. The GPU is simulated."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper

from rafaga import bundle as bundles
from rafaga.bundle import Bundle, Precision
from rafaga.errors import BundleError, DeviceError, DeviceMemoryError
from rafaga.server.config.device import Device, DeviceFallback, DeviceKind
from rafaga.server.config.per_model import PerModel
from rafaga.server.engines.contract import Engine, run
from rafaga.server.engines.cuda_engine import CudaEngine, has_known_outputs
from rafaga.server.engines.gpu import GpuDevice, GpuSettings, device_buckets
from rafaga.server.engines.loading import LoadedEngine, ModelToPlace
from rafaga.server.engines.memory_budget import MIB
from rafaga.server.engines.onnxruntime import SessionEngine, create_session
from rafaga.server.engines.providers import SessionSettings
from rafaga.server.engines.selection import Placement
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository.loader import Loader, fastest_on_gpu
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
from tests.unit.server.fake_gpu import GPU, FakeCudart, FakeGpuSession

CUDA, TENSORRT = Device(DeviceKind.CUDA), Device(DeviceKind.TENSORRT)
WAIT_S = 30.0


class Machine:
    """One simulated GPU; `sessions` are the settings of all that were made on it."""

    def __init__(self) -> None:
        self.cudart = FakeCudart()
        self.sessions: list[SessionSettings] = []
        self.made: list[FakeGpuSession] = []
        self.engines: list[Engine] = []
        self.fails: Callable[[SessionSettings], None] = lambda _: None
        self.spoils: Callable[[SessionSettings], bool] = lambda _: False

    def create(self, model: bytes, device: Device, settings: SessionSettings) -> FakeGpuSession:
        self.sessions.append(settings)
        self.fails(settings)
        fake = FakeGpuSession(create_session(model, 1), self.cudart, settings.stream)
        if self.spoils(settings):
            fake.run_with_iobinding = lambda *_: None  # type: ignore[method-assign]
        self.made.append(fake)
        return fake

    def placement(
        self, fallback: DeviceFallback = DeviceFallback.FAIL, device: Device = CUDA, **settings: Any
    ) -> Placement:
        gpu = GpuDevice(GPU, self.cudart.cuda(), GpuSettings(**settings), self.create, lambda: ("tensorrt 1",))
        return Placement((device,), fallback, gpus={0: gpu})

    def load(self, folder: Path, device: Device = CUDA, **settings: Any) -> Engine:
        return self.placement(**settings).load(device, model_of(folder)).engine

    def served(self, placement: Placement) -> Loader:
        """Keeps the engines that it loads in `engines`."""

        def load(placement: Placement, device: Device, model: ModelToPlace) -> LoadedEngine:
            loaded = placement.load(device, model)
            self.engines.append(loaded.engine)
            return loaded

        return Loader(BatchPolicy(max_queue_wait_s=60), 8, None, placement, Metrics(), engine_factory=load)

    @property
    def untouched(self) -> bool:
        cudart = self.cudart
        return not (cudart.memory or cudart.locked or cudart.streams)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publish_classifier(tmp_path)


def taken(placement: Placement) -> int:
    return placement.gpus[0].budget.taken


class TestGpu:
    def test_answers_and_memory_given_back(self, machine: Machine, folder: Path) -> None:
        placement = machine.placement()
        engine = placement.load(CUDA, model_of(folder)).engine
        image = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
        np.testing.assert_allclose(np.float32(run(engine, (image,))[0]), classify(image), atol=1e-6)
        assert taken(placement) > 0
        assert engine.close()
        assert machine.untouched
        assert taken(placement) == 0

    @pytest.mark.parametrize(
        "publish",
        [publish_classifier, publish_forecaster, publish_backbone, publish_detector, publish_sequence_model],
    )
    def test_every_kind_of_model(self, machine: Machine, tmp_path: Path, publish: Callable[[Path], Path]) -> None:
        path = publish(tmp_path)
        model = machine.served(machine.placement()).load(path, bundles.load(path))
        assert model.max_batch_size == 8
        assert isinstance(machine.engines[0], CudaEngine if has_known_outputs(model.bundle) else SessionEngine)
        model.close()
        assert machine.untouched

    def test_every_bucket_runs_at_load(self, machine: Machine, folder: Path) -> None:
        machine.load(folder, buckets=(2, 6, 99))
        assert {shapes[0][0] for shapes in machine.made[0].shapes} == {2, 6, 8}

    def test_buckets(self) -> None:
        assert device_buckets(32, ()) == (1, 2, 4, 8, 16, 32)
        assert device_buckets(20, ()) == (1, 2, 4, 8, 16, 20)
        assert device_buckets(20, (16, 4, 64, 4)) == (4, 16, 20)
        assert device_buckets(1, (16,)) == (1,)


class TestTensorRt:
    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        return tmp_path / "cache"

    def test_its_settings(self, machine: Machine, folder: Path, cache: Path, caplog: Any) -> None:
        with caplog.at_level(logging.INFO):
            engine = machine.load(folder, TENSORRT, tensorrt_cache=cache)
        (settings,) = machine.sessions  # one: TensorRT may take minutes for each
        assert settings.cache is not None
        assert settings.cache.parent == cache
        assert "TensorRT builds the model: this may take minutes" in [record.message for record in caplog.records]
        seen = [shapes[0][0] for shapes in machine.made[0].shapes]
        assert seen[:2] == [8, 1], "the extremes first: sizes between them need no build of their own"
        assert engine.close()
        assert machine.untouched

    def test_a_model_that_takes_no_batches(self, machine: Machine, tmp_path: Path, cache: Path) -> None:
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 2]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "whole", [x], [y])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        folder = tmp_path / "whole" / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        served = machine.served(machine.placement(device=TENSORRT, tensorrt_cache=cache)).load_plain(folder, "whole", 1)
        assert machine.made[0].shapes[0] == ((3, 2),)
        served.close()
        assert machine.untouched

    def test_wrong_answers_move_the_model_to_cuda(
        self, machine: Machine, folder: Path, cache: Path, caplog: Any
    ) -> None:
        machine.spoils = lambda settings: settings.cache is not None
        with caplog.at_level(logging.INFO):
            engine = machine.load(folder, TENSORRT, tensorrt_cache=cache)
        assert [settings.cache is not None for settings in machine.sessions] == [True, False]
        assert "golden outputs differ too much, loading again: golden outputs differ" in caplog.text
        record = [r for r in caplog.records if r.message == "model on the GPU"][-1]
        assert (record.device, record.tf32) == ("cuda:0", True)
        assert engine.close()
        assert machine.untouched

    @pytest.fixture
    def unbuildable(self, machine: Machine) -> Machine:
        def fail(_: SessionSettings) -> None:
            raise RuntimeError("TensorRT EP failed to create engine from network")

        machine.fails = fail
        return machine

    def test_a_model_that_it_does_not_build_is_refused(self, unbuildable: Machine, folder: Path, cache: Path) -> None:
        loader = unbuildable.served(unbuildable.placement(device=TENSORRT, tensorrt_cache=cache))
        with pytest.raises(DeviceError, match=r"does not run the model on tensorrt.*failed to create engine"):
            loader.load(folder, bundles.load(folder))
        assert unbuildable.untouched

    def test_or_runs_on_the_cpu_where_that_is_allowed(
        self, unbuildable: Machine, folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        placement = unbuildable.placement(DeviceFallback.CPU, TENSORRT, tensorrt_cache=cache)
        model = unbuildable.served(placement).load(folder, bundles.load(folder))
        assert isinstance(unbuildable.engines[0], SessionEngine)
        assert "FALLEN BACK to the CPU, as device_fallback allows: digits: ONNX Runtime does not run" in caplog.text
        assert unbuildable.untouched
        model.close()


class TestGoldenOutputs:
    def test_a_model_that_tf32_rounds_too_far_loads_again(
        self, machine: Machine, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine.spoils = lambda settings: settings.tf32
        with caplog.at_level(logging.WARNING):
            engine = machine.load(folder)
        assert [s.tf32 for s in machine.sessions] == [True, False]
        assert "golden outputs differ too much, loading again" in caplog.text
        assert engine.close()
        assert machine.untouched

    def test_an_engine_that_cannot_be_verified_leaves_nothing_behind(self, machine: Machine, folder: Path) -> None:
        def verify(_: Engine) -> None:
            raise RuntimeError("cuDNN failed")

        with pytest.raises(RuntimeError, match="cuDNN failed"):
            machine.placement().load(CUDA, dataclasses.replace(model_of(folder), verify=verify))
        assert machine.untouched

    def test_answers_that_stay_wrong_are_refused(self, machine: Machine, folder: Path) -> None:
        machine.spoils = lambda _: True
        placement = machine.placement()
        with pytest.raises(BundleError, match="golden outputs differ"):
            placement.load(CUDA, model_of(folder))
        assert machine.untouched
        assert taken(placement) == 0

    def test_a_plain_model_is_not_rounded(self, machine: Machine, folder: Path) -> None:
        path = folder.parent.parent / "plain" / "1"
        path.mkdir(parents=True)
        (path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
        model = machine.served(machine.placement()).load_plain(path, "plain", 1)
        assert [s.tf32 for s in machine.sessions] == [False]
        model.close()
        assert machine.untouched


class TestLifetimes:
    """ONNX Runtime releases memory of a GPU with the session: at once, not when the garbage is collected, and before
    the stream is destroyed."""

    @pytest.fixture(autouse=True)
    def no_collector(self) -> Iterator[None]:
        gc.disable()
        yield
        gc.enable()

    @pytest.fixture
    def lonely(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
        """Whenever a session is made or a stream ends, no other session may be alive."""
        living = weakref.WeakSet[FakeGpuSession]()
        late: list[int] = []
        create, destroy = machine.create, machine.cudart._cudaStreamDestroy

        def create_alone(*arguments: Any) -> FakeGpuSession:
            late.append(len(living))
            session = create(*arguments)
            machine.made.clear()
            living.add(session)
            return session

        def end(stream: int) -> None:
            late.append(len(living))
            destroy(stream)

        monkeypatch.setattr(machine, "create", create_alone)
        monkeypatch.setattr(machine.cudart, "_cudaStreamDestroy", end)
        yield machine
        assert late
        assert not any(late)
        assert machine.untouched

    @pytest.fixture
    def failing(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
        def fail(*_: Any) -> None:
            raise RuntimeError("CUDA failure 700")

        def from_now_on() -> None:
            monkeypatch.setattr(FakeGpuSession, "run", fail)
            monkeypatch.setattr(FakeGpuSession, "run_with_iobinding", fail)

        return from_now_on

    @pytest.mark.parametrize("publish", [publish_classifier, publish_backbone])
    def test_of_one_that_fails_as_it_is_run(
        self, lonely: Machine, tmp_path: Path, publish: Callable[[Path], Path], failing: Callable[[], None]
    ) -> None:
        failing()
        with pytest.raises(BundleError, match="CUDA failure 700"):
            lonely.load(publish(tmp_path))

    def test_of_one_whose_answers_are_wrong(self, lonely: Machine, folder: Path) -> None:
        lonely.spoils = lambda settings: settings.tf32
        assert lonely.load(folder).close()

    def test_of_one_that_failed_while_it_was_served(
        self, lonely: Machine, folder: Path, failing: Callable[[], None]
    ) -> None:
        engine = lonely.load(folder)
        failing()
        with pytest.raises(RuntimeError, match="700") as kept:
            run(engine, (np.zeros((1, 28, 28, 1), np.uint8),))
        assert engine.close()
        assert kept.value.__traceback__ is not None, "the error is still in use"


def test_a_device_that_failed_for_good(machine: Machine, folder: Path) -> None:
    """After some errors CUDA refuses everything: that is a DeviceError, and what was held is released."""
    placement = machine.placement()
    engine = placement.load(CUDA, model_of(folder)).engine
    machine.cudart.refuses["cudaSetDevice"] = 700
    with pytest.raises(DeviceError, match=r"cuda:0: cudaSetDevice: an error \(700\)"):
        placement.load(CUDA, model_of(folder))
    assert engine.close()
    assert taken(placement) == 0


class TestMemory:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"memory_bytes": 100 * MIB}, r"digits needs about 25\d MiB of cuda:0, 100 of 100 MiB are left"),
            ({"model_memory": PerModel(100 * MIB)}, "a model may have 100: raise gpu_model_memory_mib"),
        ],
    )
    def test_a_model_that_cannot_fit_is_refused_before_it_loads(
        self, machine: Machine, folder: Path, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(DeviceMemoryError, match=message):
            machine.load(folder, **settings)
        assert machine.sessions == []

    def test_the_share_is_the_limit_of_the_arena(self, machine: Machine, folder: Path) -> None:
        shares = PerModel[int | None](100 * MIB, {"digits": 300 * MIB, "other": 200 * MIB})
        machine.load(folder, model_memory=shares)
        assert machine.sessions[0].memory_bytes == 300 * MIB

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"model_memory": PerModel(300 * MIB)}, "a model may have 300"),
            ({"memory_bytes": 290 * MIB}, "290 of 290 MiB are left"),
        ],
    )
    def test_the_size_after_the_load_counts(
        self, machine: Machine, folder: Path, settings: dict[str, Any], message: str
    ) -> None:
        def hog(_: Any) -> None:
            machine.cudart.total -= 813 * MIB

        machine.fails = hog
        placement = machine.placement(**settings)
        with pytest.raises(DeviceMemoryError, match=rf"digits took 81\d MiB of cuda:0, {message}"):
            placement.load(CUDA, model_of(folder))
        assert machine.untouched
        assert taken(placement) == 0


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
        placement = machine.placement()
        with pytest.raises(error, match=message):
            machine.served(placement).load(folder, bundles.load(folder))
        assert machine.untouched
        assert taken(placement) == 0
        machine.served(machine.placement(DeviceFallback.CPU)).load(folder, bundles.load(folder))
        assert isinstance(machine.engines[0], SessionEngine)
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
            machine.served(machine.placement(DeviceFallback.CPU)).load(folder, bundles.load(folder))


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
