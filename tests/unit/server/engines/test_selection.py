"""Models onto devices: what is measured there, what is kept, refused and given back. The GPU is a pretended one."""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
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
from rafaga.server.config.device import CPU, Device, DeviceFallback, DeviceKind
from rafaga.server.config.per_model import EngineOptions, PerModel
from rafaga.server.config.settings import GpuChoice
from rafaga.server.engines import memory_budget as gpu_memory
from rafaga.server.engines import selection as placements
from rafaga.server.engines.devices import Choice
from rafaga.server.engines.memory_budget import MIB
from rafaga.server.engines.onnxruntime import Engine, Golden, create_session
from rafaga.server.engines.pipelined import SLOTS, BoundEngine, PaddedEngine, fits
from rafaga.server.engines.providers import CudaSettings, TensorRtSettings
from rafaga.server.engines.selection import GpuSettings, Placement, Site, Task, device_buckets
from rafaga.server.engines.shared_lock import Gate
from rafaga.server.execution.served_model import ServedModel
from rafaga.server.observability.metrics import Metrics
from rafaga.server.repository.loader import Loader, fastest_on_gpu
from rafaga.server.scheduling.batcher import BatchPolicy
from rafaga.server.scheduling.job import Job
from tests.bundles import (
    classify,
    publish_backbone,
    publish_classifier,
    publish_detector,
    publish_forecaster,
    publish_segmenter,
    publish_sequence_model,
)
from tests.unit.server.fake_gpu import GPU, FakeCudart, FakeGpuSession

CUDA = Device(DeviceKind.CUDA)
WAIT_S = 30.0


class Machine:
    """One pretended GPU; `sessions` are the settings of all that were made on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, graphs: bool = True) -> None:
        self.cudart = FakeCudart()
        self.graphs = graphs
        self.sessions: list[CudaSettings] = []
        self.made: list[FakeGpuSession] = []
        self.tensorrt: list[TensorRtSettings | None] = []
        self.fails: Callable[[CudaSettings], None] = lambda _: None
        self.spoils: Callable[[CudaSettings], bool] = lambda _: False
        self.plain_delay: Callable[[CudaSettings], float] = lambda _: 0.0
        self.late: list[FakeGpuSession] = []
        monkeypatch.setattr(placements, "create_gpu_session", self.create)

    def create(self, model: bytes, device: Device, settings: CudaSettings, tensorrt: Any = None) -> FakeGpuSession:
        self.sessions.append(settings)
        self.tensorrt.append(tensorrt)
        self.fails(settings)
        session = create_session(model, 1)
        fake = FakeGpuSession(session, self.cudart, settings.stream, graphs=self.graphs and settings.graphs)
        seconds = self.plain_delay(settings)
        if seconds:
            fake.plain_delay = lambda: threading.Event().wait(seconds) and None
        if self.spoils(settings):
            fake.run_with_iobinding = lambda *_: None  # type: ignore[method-assign]
        self.made.append(fake)
        return fake

    def placement(self, fallback: DeviceFallback = DeviceFallback.FAIL, **settings: Any) -> Placement:
        gpu = GpuSettings(**({"nhwc": GpuChoice.OFF, "graphs": GpuChoice.OFF} | settings))
        site = Site(GPU, self.cudart.cuda(), gpu.memory_bytes, Gate(), threading.Lock())
        return Placement((Device(DeviceKind.CUDA),), fallback, gpu, _sites={0: site})

    @property
    def untouched(self) -> bool:
        cudart = self.cudart
        return not (cudart.memory or cudart.locked or cudart.streams or cudart.events)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publish_classifier(tmp_path)


def task(folder: Path, rows: int = 8) -> Task:
    bundle = bundles.load(folder)
    golden = Golden.load(bundle, folder / bundles.GOLDEN)

    def proof(engine: Engine) -> None:
        golden.check(engine.run(golden.inputs), 1e-4)

    return Task(bundle, (folder / "model.onnx").read_bytes(), Precision.FP32, golden, rows, proof)


def loader(placement: Placement, precision: Precision | None = None) -> Loader:
    return Loader(BatchPolicy(max_queue_wait_s=60), 8, precision, placement, Metrics())


class TestCpu:
    def test_small_models_are_run_as_they_come(self, folder: Path) -> None:
        engine = Placement().engine(CPU, task(folder))
        assert type(engine) is Engine

    def test_large_ones_are_bound(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(placements, "_BOUND_S", 0.0)
        engine = Placement().engine(CPU, task(folder))
        assert isinstance(engine, BoundEngine)
        image = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
        np.testing.assert_allclose(engine.run((image,))[0], classify(image), atol=1e-6)
        assert engine.close()

    def test_those_without_known_outputs_are_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(placements, "_BOUND_S", 0.0)
        engine = Placement().engine(CPU, task(publish_backbone(tmp_path)))
        assert type(engine) is Engine

    def test_a_choice_of_the_cpu_asks_for_no_gpu(self) -> None:
        engines = PerModel(EngineOptions())
        placement = Placement.on(Choice((CPU,), "said so"), DeviceFallback.FAIL, GpuSettings(), engines)
        assert (placement.devices, placement.gpu) == ((CPU,), False)

    def test_every_model_has_engines_of_its_own(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As many as are set for it, with as many threads each."""
        asked: list[int] = []

        def create(model: bytes, threads: int, spinning: bool) -> ort.InferenceSession:
            asked.append(threads)
            return create_session(model, 1)

        monkeypatch.setattr("rafaga.server.engines.onnxruntime.create_session", create)
        engines = PerModel(EngineOptions(instances=2, threads=4), {"other": EngineOptions(threads=8)})
        placement = Placement((Device(DeviceKind.CUDA), Device(DeviceKind.CUDA, 1)), engines=engines)
        assert [str(device) for device in placement.devices_of("digits")] == ["cuda:0", "cuda:1"] * 2
        assert len(placement.devices_of("other")) == 2
        assert placement.on_cpu().devices_of("digits") == (CPU, CPU)
        placement.on_cpu().engine(CPU, task(folder))
        assert asked == [4]


class TestGpu:
    def test_answers_and_memory_given_back(self, machine: Machine, folder: Path) -> None:
        placement = machine.placement()
        engine = placement.engine(CUDA, task(folder))
        image = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
        np.testing.assert_allclose(engine.run((image,))[0], classify(image), atol=1e-6)
        assert placement._sites[0].budget.taken > 0
        assert engine.close()
        assert machine.untouched
        assert placement._sites[0].budget.taken == 0

    @pytest.mark.parametrize(
        "publish",
        [
            publish_classifier,
            publish_forecaster,
            publish_backbone,
            publish_detector,
            publish_segmenter,
            publish_sequence_model,
        ],
    )
    def test_every_kind_of_model(self, machine: Machine, tmp_path: Path, publish: Callable[[Path], Path]) -> None:
        path = publish(tmp_path)
        model = loader(machine.placement(graphs=GpuChoice.AUTO)).load(path, bundles.load(path))
        assert model.max_batch_size == 8
        assert isinstance(model.engines[0], BoundEngine if fits(model.bundle) else PaddedEngine)
        model.close()
        assert machine.untouched

    def test_every_bucket_was_run_before_anybody_asks(self, machine: Machine, folder: Path) -> None:
        machine.placement(buckets=(2, 6, 99)).engine(CUDA, task(folder))
        assert {shapes[0][0] for shapes in machine.made[0].shapes} == {2, 6, 8}

    def test_buckets(self) -> None:
        assert device_buckets(32, ()) == (1, 2, 4, 8, 16, 32)
        assert device_buckets(20, ()) == (1, 2, 4, 8, 16, 20)
        assert device_buckets(20, (16, 4, 64, 4)) == (4, 16, 20)
        assert device_buckets(1, (16,)) == (1,)

    def test_it_is_served(self, machine: Machine, folder: Path) -> None:
        model = loader(machine.placement(graphs=GpuChoice.AUTO)).load(folder, bundles.load(folder))
        model.start()
        images = np.random.default_rng(0).integers(0, 256, (60, 28, 28, 1), dtype=np.uint8)
        answers: dict[int, np.ndarray] = {}
        done = threading.Semaphore(0)

        def answered(at: int, outputs: Any) -> None:
            answers[at] = outputs[0]
            done.release()

        for at in range(20):
            model.submit(
                Job(
                    (images[3 * at : 3 * at + 3],),
                    lambda outputs, _, at=at: answered(at, outputs),  # type: ignore[misc]
                    lambda error: pytest.fail(str(error)),
                )
            )
        for _ in range(20):
            assert done.acquire(timeout=WAIT_S)
        model.close()
        for at, answer in answers.items():
            np.testing.assert_allclose(answer, classify(images[3 * at : 3 * at + 3]), atol=1e-6)
        assert machine.untouched


class TestTuning:
    def test_the_faster_layout_is_kept(self, machine: Machine, folder: Path) -> None:
        machine.plain_delay = lambda settings: 0.0 if settings.nhwc else 0.004
        machine.placement(nhwc=GpuChoice.AUTO).engine(CUDA, task(folder))
        assert [s.nhwc for s in machine.sessions] == [False, True, True]

    def test_nhwc_that_does_not_help_is_left(self, machine: Machine, folder: Path) -> None:
        machine.plain_delay = lambda settings: 0.004 if settings.nhwc else 0.0
        machine.placement(nhwc=GpuChoice.AUTO).engine(CUDA, task(folder))
        assert machine.sessions[-1].nhwc is False

    @pytest.mark.parametrize(
        "message", ["Could not find an implementation for com.ms.internal.nhwc.Conv", "out of memory"]
    )
    def test_nhwc_that_does_not_run_is_left(
        self, machine: Machine, folder: Path, message: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse(settings: CudaSettings) -> None:
            if settings.nhwc:
                raise RuntimeError(message)

        machine.fails = refuse
        engine = machine.placement(nhwc=GpuChoice.AUTO).engine(CUDA, task(folder))
        assert [s.nhwc for s in machine.sessions] == [False, True, False]
        assert "NHWC is left" in caplog.text
        assert engine.close()
        assert machine.untouched

    def test_nhwc_that_is_fast_and_wrong_is_left_and_costs_nothing_else(
        self, machine: Machine, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine.plain_delay = lambda settings: 0.0 if settings.nhwc else 0.004
        machine.spoils = lambda settings: settings.nhwc
        engine = machine.placement(nhwc=GpuChoice.AUTO).engine(CUDA, task(folder))
        assert [(s.nhwc, s.tf32) for s in machine.sessions] == [(False, True), (True, True), (False, True)]
        assert "NHWC is left: golden outputs differ" in caplog.text
        assert engine.close()
        assert machine.untouched

    def test_models_without_images_have_no_layout(self, machine: Machine, tmp_path: Path) -> None:
        machine.placement(nhwc=GpuChoice.AUTO).engine(CUDA, task(publish_forecaster(tmp_path)))
        assert len(machine.sessions) == 1

    @pytest.mark.parametrize(("choice", "nhwc"), [(GpuChoice.ON, True), (GpuChoice.OFF, False)])
    def test_told(self, machine: Machine, folder: Path, choice: GpuChoice, nhwc: bool) -> None:
        machine.placement(nhwc=choice).engine(CUDA, task(folder))
        assert [s.nhwc for s in machine.sessions] == [nhwc]

    def test_graphs_where_they_win(self, machine: Machine, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        machine.plain_delay = lambda _: 0.004
        with caplog.at_level(logging.INFO):
            engine = machine.placement(graphs=GpuChoice.AUTO).engine(CUDA, task(folder))
        assert [s.graphs for s in machine.sessions] == [True]
        (told,) = (r for r in caplog.records if r.message == "CUDA graphs captured")
        assert told.buckets == [1, 2, 4, 8]  # type: ignore[attr-defined]
        assert engine.close()
        assert machine.untouched

    def test_a_model_that_cannot_be_captured_runs_without(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        machine = Machine(monkeypatch, graphs=False)
        engine = machine.placement(graphs=GpuChoice.AUTO).engine(CUDA, task(folder))
        assert [s.graphs for s in machine.sessions] == [True, False]
        assert engine.close()
        assert machine.untouched

    def test_a_session_that_refuses_graphs(self, machine: Machine, folder: Path) -> None:
        def refuse(settings: CudaSettings) -> None:
            if settings.graphs:
                raise RuntimeError("This session cannot use the graph capture feature as requested by the user")

        machine.fails = refuse
        engine = machine.placement(graphs=GpuChoice.AUTO).engine(CUDA, task(folder))
        assert [s.graphs for s in machine.sessions] == [True, False]
        assert engine.close()
        assert machine.untouched

    def test_free_dimensions_are_not_captured(self, machine: Machine, tmp_path: Path) -> None:
        machine.placement(graphs=GpuChoice.ON).engine(CUDA, task(publish_forecaster(tmp_path)))
        assert [s.graphs for s in machine.sessions] == [False]


class TestTensorRt:
    def test_what_it_is_told(
        self, machine: Machine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
    ) -> None:
        monkeypatch.setattr(placements, "tensorrt_versions", lambda: ("tensorrt 1", "onnxruntime 2"))
        device = Device(DeviceKind.TENSORRT)
        cache = tmp_path / "cache"
        placement = machine.placement(nhwc=GpuChoice.AUTO, graphs=GpuChoice.AUTO, tensorrt_cache=cache)
        with caplog.at_level(logging.INFO):
            engine = placement.engine(device, task(folder))
        (settings,) = machine.tensorrt
        assert settings is not None, "and nothing is tried twice: an engine takes minutes to build"
        assert settings.cache.parent == cache
        assert settings.shapes == (("image", (1, 28, 28, 1), (8, 28, 28, 1), (8, 28, 28, 1)),)
        assert settings.stream == machine.sessions[0].stream
        messages = [record.message for record in caplog.records]
        assert messages.index("TensorRT's build begins") < messages.index("TensorRT's build ended")
        assert engine.close()
        assert machine.untouched

    @pytest.fixture
    def partitioned(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
        """TensorRT has no kernel for some node: it knows nothing of the shapes between the parts."""
        monkeypatch.setattr(placements, "tensorrt_versions", lambda: ("tensorrt 1",))

        def refuse(_: CudaSettings) -> None:
            told = machine.tensorrt[-1]
            if told is not None and told.shapes:
                raise RuntimeError(
                    "[TensorRT EP] User needs to provide all the dynamic shape inputs with associated profiles if they "
                    "want to explicitly set profiles through provider options."
                )

        machine.fails = refuse
        return machine

    def test_a_model_in_parts_is_built_for_the_sizes_that_come(
        self, partitioned: Machine, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        placement = partitioned.placement(tensorrt_cache=tmp_path / "cache")
        engine = placement.engine(Device(DeviceKind.TENSORRT), task(folder))
        assert [bool(told and told.shapes) for told in partitioned.tensorrt] == [True, False]
        assert "TensorRT takes only parts of the model" in caplog.text
        seen = [shapes[0][0] for shapes in partitioned.made[0].shapes]
        assert seen[:2] == [8, 1], "the extremes first: what lies between needs no build of its own"
        image = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
        np.testing.assert_allclose(engine.run((image,))[0], classify(image), atol=1e-6)
        assert engine.close()
        assert partitioned.untouched

    def test_a_model_that_takes_no_batches_has_no_profile(
        self, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its first dimension is its own: 3 here, and not a batch of one row."""
        monkeypatch.setattr(placements, "tensorrt_versions", lambda: ("tensorrt 1",))
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 2]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "whole", [x], [y])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        folder = tmp_path / "whole" / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        placement = machine.placement(tensorrt_cache=tmp_path / "cache")
        placement = dataclasses.replace(placement, devices=(Device(DeviceKind.TENSORRT),))
        served = loader(placement).load_plain(folder)
        assert [told is not None and told.shapes for told in machine.tensorrt] == [()]
        served.close()
        assert machine.untouched

    def test_what_it_rounds_too_far_runs_with_cuda(
        self, machine: Machine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
    ) -> None:
        monkeypatch.setattr(placements, "tensorrt_versions", lambda: ("tensorrt 1",))
        machine.spoils = lambda _: machine.tensorrt[-1] is not None
        device = Device(DeviceKind.TENSORRT)
        with caplog.at_level(logging.INFO):
            engine = machine.placement(tensorrt_cache=tmp_path / "cache").engine(device, task(folder))
        assert [told is not None for told in machine.tensorrt] == [True, False]
        assert "TensorRT's answers are wrong, on cuda:0 instead: golden outputs differ" in caplog.text
        (told,) = (r for r in caplog.records if r.message == "model on the GPU")
        assert (told.device, told.tf32) == ("cuda:0", True)
        assert engine.close()
        assert machine.untouched

    @pytest.fixture
    def unbuildable(self, partitioned: Machine) -> Machine:
        refuse = partitioned.fails

        def fail(settings: CudaSettings) -> None:
            refuse(settings)
            raise RuntimeError("TensorRT EP failed to create engine from network")

        partitioned.fails = fail
        return partitioned

    def on_tensorrt(self, machine: Machine, fallback: DeviceFallback, cache: Path) -> Loader:
        placement = machine.placement(fallback, tensorrt_cache=cache)
        return loader(dataclasses.replace(placement, devices=(Device(DeviceKind.TENSORRT),)))

    def test_what_it_does_not_build_is_refused_with_its_reason(
        self, unbuildable: Machine, folder: Path, tmp_path: Path
    ) -> None:
        loads = self.on_tensorrt(unbuildable, DeviceFallback.FAIL, tmp_path / "cache")
        with pytest.raises(DeviceError, match=r"does not run the model on tensorrt.*failed to create engine"):
            loads.load(folder, bundles.load(folder))
        assert unbuildable.untouched

    def test_or_served_by_the_cpu_where_that_is_allowed(
        self, unbuildable: Machine, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = self.on_tensorrt(unbuildable, DeviceFallback.CPU, tmp_path / "cache").load(folder, bundles.load(folder))
        assert type(model.engines[0]) is Engine
        assert "FALLEN BACK to the CPU, as device_fallback allows: digits: ONNX Runtime does not run" in caplog.text
        assert unbuildable.untouched
        model.close()

    def test_a_folder_that_is_not_ours_keeps_the_model_from_it(
        self, machine: Machine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(placements, "tensorrt_versions", lambda: ("tensorrt 1",))
        cache = tmp_path / "cache"
        cache.mkdir()
        cache.chmod(0o777)
        with pytest.raises(DeviceError, match="only this user may write to"):
            machine.placement(tensorrt_cache=cache).engine(Device(DeviceKind.TENSORRT), task(folder))
        assert machine.untouched


class TestProof:
    def test_answers_too_far_off_are_tried_again_in_full_precision(
        self, machine: Machine, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine.spoils = lambda settings: settings.tf32
        with caplog.at_level(logging.WARNING):
            machine.placement(graphs=GpuChoice.OFF).engine(CUDA, task(folder))
        assert [(s.tf32, s.graphs) for s in machine.sessions] == [(True, False), (False, False)]
        assert "loaded again, with TF32 off, CUDA graphs off, NHWC off: golden outputs differ" in caplog.text

    def test_graphs_stay_where_only_tf32_was_wrong(
        self, machine: Machine, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine.spoils = lambda settings: settings.tf32
        with caplog.at_level(logging.INFO):
            engine = machine.placement(graphs=GpuChoice.ON).engine(CUDA, task(folder))
        assert [(s.tf32, s.graphs) for s in machine.sessions] == [(True, True), (False, True)]
        (told,) = (r for r in caplog.records if r.message == "model on the GPU")
        assert (told.tf32, told.nhwc, told.graphs) == (False, False, [1, 2, 4, 8])  # type: ignore[attr-defined]
        assert engine.close()
        assert machine.untouched

    def test_graphs_go_where_they_are_wrong_too(self, machine: Machine, folder: Path) -> None:
        machine.spoils = lambda settings: settings.graphs
        engine = machine.placement(graphs=GpuChoice.ON).engine(CUDA, task(folder))
        assert [(s.tf32, s.graphs) for s in machine.sessions] == [(True, True), (False, True), (False, False)]
        assert engine.close()
        assert machine.untouched

    def test_a_proof_that_cannot_be_had_leaves_nothing_behind(self, machine: Machine, folder: Path) -> None:
        def proof(_: Engine) -> None:
            raise RuntimeError("cuDNN failed")

        with pytest.raises(RuntimeError, match="cuDNN failed"):
            machine.placement().engine(CUDA, dataclasses.replace(task(folder), proof=proof))
        assert machine.untouched

    def test_answers_that_stay_wrong_are_refused(self, machine: Machine, folder: Path) -> None:
        machine.spoils = lambda _: True
        placement = machine.placement()
        with pytest.raises(BundleError, match="golden outputs differ"):
            placement.engine(CUDA, task(folder))
        assert machine.untouched
        assert placement._sites[0].budget.taken == 0

    def test_a_plain_model_is_not_rounded(self, machine: Machine, folder: Path) -> None:
        path = folder.parent.parent / "plain" / "1"
        path.mkdir(parents=True)
        (path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
        model = loader(machine.placement()).load_plain(path)
        assert [s.tf32 for s in machine.sessions] == [False]
        model.close()
        assert machine.untouched


class TestLifetimes:
    """What ONNX Runtime keeps of a GPU goes with its session: at once, not when the garbage is collected, and never
    after the stream it ran on."""

    @pytest.fixture(autouse=True)
    def no_collector(self) -> Iterator[None]:
        gc.disable()
        yield
        gc.enable()

    @pytest.fixture
    def living(self) -> weakref.WeakSet[FakeGpuSession]:
        return weakref.WeakSet()

    @pytest.fixture
    def lonely(
        self, machine: Machine, living: weakref.WeakSet[FakeGpuSession], monkeypatch: pytest.MonkeyPatch
    ) -> Machine:
        """A machine that looks, whenever a session is made or a stream ends, whether another still lives."""
        destroy = machine.cudart._cudaStreamDestroy

        def create(*arguments: Any) -> FakeGpuSession:
            machine.late += living
            session = Machine.create(machine, *arguments)
            machine.made.clear()
            living.add(session)
            return session

        def end(stream: int) -> None:
            machine.late += living
            destroy(stream)

        monkeypatch.setattr(placements, "create_gpu_session", create)
        monkeypatch.setattr(machine.cudart, "_cudaStreamDestroy", end)
        return machine

    def test_of_a_model_that_cannot_be_captured(self, lonely: Machine, folder: Path) -> None:
        lonely.graphs = False
        engine = lonely.placement(graphs=GpuChoice.ON).engine(CUDA, task(folder))
        assert [s.graphs for s in lonely.sessions] == [True, False]
        assert engine.close()
        assert (lonely.late, lonely.untouched) == ([], True)

    @pytest.mark.parametrize("publish", [publish_classifier, publish_backbone])
    def test_of_one_that_fails_as_it_is_run(
        self, lonely: Machine, tmp_path: Path, publish: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(self: FakeGpuSession, *_: Any) -> None:
            raise RuntimeError("CUDA failure 700")

        monkeypatch.setattr(FakeGpuSession, "run", fail)
        monkeypatch.setattr(FakeGpuSession, "run_with_iobinding", fail)
        with pytest.raises(BundleError, match="CUDA failure 700"):
            lonely.placement().engine(CUDA, task(publish(tmp_path)))
        assert (lonely.late, lonely.untouched) == ([], True)

    def test_of_one_whose_answers_are_wrong(self, lonely: Machine, folder: Path) -> None:
        lonely.spoils = lambda settings: settings.tf32 or settings.graphs
        engine = lonely.placement(nhwc=GpuChoice.AUTO, graphs=GpuChoice.ON).engine(CUDA, task(folder))
        assert engine.close()
        assert (lonely.late, lonely.untouched) == ([], True)

    def test_of_one_that_failed_while_it_was_served(
        self, lonely: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = lonely.placement().engine(CUDA, task(folder))

        def fail(self: FakeGpuSession, *_: Any) -> None:
            raise RuntimeError("CUDA failure 700")

        monkeypatch.setattr(FakeGpuSession, "run_with_iobinding", fail)
        with pytest.raises(RuntimeError, match="700") as kept:
            engine.run((np.zeros((1, 28, 28, 1), np.uint8),))
        assert engine.close()
        assert kept.value.__traceback__ is not None, "the error is still looked at"
        assert (lonely.late, lonely.untouched) == ([], True)

    def test_the_session_ends_while_nobody_captures(self, lonely: Machine, folder: Path) -> None:
        for publish in (lambda: folder, lambda: publish_backbone(folder.parent.parent)):
            placement = lonely.placement()
            inside: list[int] = []
            engine = placement.engine(CUDA, task(publish()))
            session = engine.session
            weakref.finalize(
                session, lambda gate, inside: inside.append(gate._inside), placement._sites[0].gate, inside
            )
            del session
            assert engine.close()
            assert inside == [1], "it was let in by the gate"


def test_a_device_that_failed_for_good_is_called_so(machine: Machine, folder: Path) -> None:
    """After some errors CUDA refuses everything: the device is to blame, not the bundle; what was held is let go."""
    placement = machine.placement()
    engine = placement.engine(CUDA, task(folder))
    machine.cudart.refuses["cudaSetDevice"] = 700
    with pytest.raises(DeviceError, match=r"cuda:0: cudaSetDevice: an error \(700\)"):
        placement.engine(CUDA, task(folder))
    assert engine.close()
    assert placement._sites[0].budget.taken == 0


class TestMemory:
    def test_what_does_not_fit_is_refused_before_anything_is_done(self, machine: Machine, folder: Path) -> None:
        with pytest.raises(DeviceMemoryError, match=r"digits needs about 25\d MiB of cuda:0, 100 of 100 MiB are left"):
            machine.placement(memory_bytes=100 * MIB).engine(CUDA, task(folder))
        assert machine.sessions == []

    def test_a_share_that_is_too_small(self, machine: Machine, folder: Path) -> None:
        with pytest.raises(DeviceMemoryError, match="a model may have 100: raise gpu_model_memory_mib"):
            machine.placement(model_memory=PerModel(100 * MIB)).engine(CUDA, task(folder))

    def test_the_share_is_the_limit_of_the_arena(self, machine: Machine, folder: Path) -> None:
        shares = PerModel[int | None](100 * MIB, {"digits": 300 * MIB, "other": 200 * MIB})
        machine.placement(model_memory=shares).engine(CUDA, task(folder))
        assert machine.sessions[0].memory_bytes == 300 * MIB

    def test_a_model_that_took_more_than_its_share_is_put_out(self, machine: Machine, folder: Path) -> None:
        hogged: list[int] = []

        def hog(_: CudaSettings) -> None:
            hogged.append(machine.cudart.cuda().allocate(813 * MIB))

        machine.fails = hog
        placement = machine.placement(model_memory=PerModel(300 * MIB))
        with pytest.raises(DeviceMemoryError, match=r"digits took 81\d MiB of cuda:0, a model may have 300"):
            placement.engine(CUDA, task(folder))
        assert list(machine.cudart.memory) == hogged
        assert placement._sites[0].budget.taken == 0

    def test_a_model_that_takes_what_is_not_left_is_put_out(self, machine: Machine, folder: Path) -> None:
        """Nobody set a limit for one model: what is measured after the load counts, not what was expected before."""
        hogged: list[int] = []

        def hog(_: CudaSettings) -> None:
            hogged.append(machine.cudart.cuda().allocate(813 * MIB))

        placement = machine.placement(memory_bytes=290 * MIB)
        machine.fails = hog
        with pytest.raises(DeviceMemoryError, match=r"digits takes 81\d MiB of cuda:0, 290 of 290 MiB are left"):
            placement.engine(CUDA, task(folder))
        assert list(machine.cudart.memory) == hogged
        assert placement._sites[0].budget.taken == 0

    def test_buffers_that_grow_are_counted_and_stop_at_the_budget(
        self, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A series too long for what is left fails alone; shorter ones go on."""
        placement = machine.placement()
        budget = placement._sites[0].budget
        engine = placement.engine(CUDA, task(publish_forecaster(tmp_path)))
        loaded = budget.taken

        def ask(steps: int) -> None:
            engine.run((np.ones((2, steps), np.float32), np.full(2, steps, np.int64)))

        for _ in range(SLOTS):
            ask(5_000)
        grown = budget.taken - loaded
        assert 0 < grown < MIB
        monkeypatch.setattr(gpu_memory, "HEADROOM", 0)
        monkeypatch.setattr(budget, "_total", budget.taken)
        with pytest.raises(DeviceMemoryError, match=r"series takes .* are left"):
            ask(50_000)
        assert budget.taken - loaded == grown, "a refusal takes nothing"
        for _ in range(SLOTS):
            ask(5_000)
        assert engine.close()
        assert (machine.untouched, budget.taken) == (True, 0)

    def test_memory_that_runs_out_is_called_so(self, machine: Machine, folder: Path) -> None:
        def full(_: CudaSettings) -> None:
            raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 123")

        machine.fails = full
        placement = machine.placement()
        with pytest.raises(DeviceMemoryError, match="cuda:0 ran out of memory"):
            placement.engine(CUDA, task(folder))
        assert machine.untouched
        assert placement._sites[0].budget.taken == 0

    def test_another_error_is_the_model_s(self, machine: Machine, folder: Path) -> None:
        def broken(_: CudaSettings) -> None:
            raise RuntimeError("Could not find an implementation for Foo(1)")

        machine.fails = broken
        with pytest.raises(
            BundleError, match="digits: ONNX Runtime does not run the model on cuda:0: Could not find"
        ) as e:
            machine.placement().engine(CUDA, task(folder))
        assert not isinstance(e.value, DeviceError)


class TestFallback:
    @staticmethod
    def full(_: CudaSettings) -> None:
        raise RuntimeError("CUDA failure 2: out of memory")

    def test_failing_is_the_default(self, machine: Machine, folder: Path) -> None:
        machine.fails = self.full
        with pytest.raises(DeviceMemoryError):
            loader(machine.placement()).load(folder, bundles.load(folder))

    def test_the_cpu_when_it_is_allowed_and_never_in_silence(
        self, machine: Machine, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine.fails = self.full
        model = loader(machine.placement(DeviceFallback.CPU)).load(folder, bundles.load(folder))
        assert type(model.engines[0]) is Engine
        assert "FALLEN BACK to the CPU, as device_fallback allows: cuda:0 ran out of memory" in caplog.text

    def test_the_cpu_too_for_what_cuda_fails_on(self, machine: Machine, folder: Path) -> None:
        """Not for want of memory, and nothing is wrong with the model."""

        def fail(_: CudaSettings) -> None:
            raise RuntimeError("CUDA failure 209: no kernel image is available for execution on the device ; GPU=0")

        machine.fails = fail
        with pytest.raises(
            DeviceError, match=r"digits: ONNX Runtime does not run the model on cuda:0: CUDA failure 209"
        ):
            loader(machine.placement()).load(folder, bundles.load(folder))
        model = loader(machine.placement(DeviceFallback.CPU)).load(folder, bundles.load(folder))
        assert type(model.engines[0]) is Engine
        assert machine.untouched

    def test_a_broken_bundle_is_broken_everywhere(self, machine: Machine, folder: Path) -> None:
        machine.spoils = lambda _: True
        with pytest.raises(BundleError, match="golden outputs differ"):
            loader(machine.placement(DeviceFallback.CPU)).load(folder, bundles.load(folder))


class TestSeveralGpus:
    def test_one_engine_each_and_all_of_them_work(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        machine = Machine(monkeypatch)
        one = machine.placement()
        second = Site(GPU, FakeCudart().cuda(), None, one._sites[0].gate, one._sites[0].loading)
        monkeypatch.setattr(placements, "create_gpu_session", lambda model, *_: create_session(model, 1))
        monkeypatch.setattr(placements, "fits", lambda _: False)
        devices = (Device(DeviceKind.CUDA, 0), Device(DeviceKind.CUDA, 1))
        placement = Placement(devices, settings=one.settings, _sites={0: one._sites[0], 1: second})
        model = loader(placement).load(folder, bundles.load(folder))
        assert len(model.engines) == 2
        together = threading.Barrier(2, timeout=WAIT_S)
        ran: list[int] = []
        for number, engine in enumerate(model.engines):

            def run(inputs: Any, number: int = number) -> Any:
                together.wait()  # passes only when both run at the same time
                ran.append(number)
                return (classify(inputs[0]),)

            monkeypatch.setattr(engine, "run", run)
        model.start()
        done = threading.Semaphore(0)
        image = np.zeros((8, 28, 28, 1), np.uint8)
        for _ in range(4):
            model.submit(Job((image,), lambda *_: done.release(), lambda error: pytest.fail(str(error))))
        for _ in range(4):
            assert done.acquire(timeout=WAIT_S)
        assert sorted(ran) == [0, 0, 1, 1]
        model.close()

    def test_the_capacity_is_that_of_all(self, machine: Machine, folder: Path) -> None:
        bundle = bundles.load(folder)
        alone = loader(Placement()).load(folder, bundle)
        engines, latency = alone.engines, alone._batcher.latency
        metrics = Metrics().model("digits")
        samples = Golden.load(bundle, folder / bundles.GOLDEN)
        model = ServedModel(
            bundle, alone.variant, engines * 3, latency, BatchPolicy(), metrics, samples, lambda n: engines[n]
        )
        assert model.capacity_rows_per_s() == pytest.approx(3 * alone.capacity_rows_per_s())


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
        ({"fp16": False, "int8": True}, "fp32", "how much accuracy"),
        ({"fp16": True, "int8": True}, "fp16", "kept its accuracy"),
    ],
)
def test_which_variant_a_gpu_serves(folder: Path, eligible: dict[str, bool], chosen: str, why: str) -> None:
    variant, said = fastest_on_gpu(with_variants(bundles.load(folder), **eligible))
    assert variant.precision == chosen
    assert why in said


def test_onnx_runtime_of_this_machine_has_what_is_used() -> None:
    """The names on ONNX Runtime's side that only a GPU would exercise."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "3")
    assert options.get_run_config_entry("gpu_graph_id") == "3"
    assert hasattr(ort, "preload_dlls")
