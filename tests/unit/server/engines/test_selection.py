"""Which engine a model gets on the CPU, and with how many threads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnxruntime as ort
import pytest

from rafaga import bundle as bundles
from rafaga.bundle import Precision
from rafaga.errors import BundleError
from rafaga.server.config.device import CPU, Device, DeviceKind
from rafaga.server.config.settings import Config, EngineSettings
from rafaga.server.engines import selection
from rafaga.server.engines.batched import Completed
from rafaga.server.engines.contract import Engine
from rafaga.server.engines.devices import DeviceChoice
from rafaga.server.engines.loading import ModelToPlace, Samples, measured
from rafaga.server.engines.onnxruntime import create_session
from rafaga.server.engines.selection import CpuThreads, Placement
from rafaga.server.repository.golden import Golden
from rafaga.server.scheduling.latency import DISPATCH_S
from tests.bundles import publish_classifier


def settings(**values: object) -> EngineSettings:
    return Config.of(**values).engines


def model_of(folder: Path, rows: int = 8) -> ModelToPlace:
    bundle = bundles.load(folder)
    golden = Golden.load(bundle, folder / bundles.GOLDEN)

    def verify(engine: Engine) -> None:
        golden.verify(engine, 1e-4, rows)

    return ModelToPlace(bundle, (folder / "model.onnx").read_bytes(), Precision.FP32, golden, rows, verify)


@pytest.mark.parametrize(("placement", "depth"), [(Placement(), 1), (Placement(pipelined_s=0.0), 2)])
def test_large_models_are_pipelined(tmp_path: Path, placement: Placement, depth: int) -> None:
    engine, latency = placement.load(CPU, model_of(publish_classifier(tmp_path)))
    assert (engine.depth, latency.buckets) == (depth, (1, 2, 4, 8))
    assert engine.close()


def test_every_bucket_is_warm_before_it_is_measured() -> None:
    engine = Mock(submit=Mock(return_value=Completed(())))
    table = measured(engine, Samples((np.zeros((3, 2)),)), (1, 2, 4, 6))
    sizes = [part.stop for (part,) in (call.args[0] for call in engine.submit.call_args_list)]
    for rows in table.buckets:
        assert sizes.count(rows) >= 3
        assert table.predict(rows) > DISPATCH_S


def test_a_choice_of_the_cpu_needs_no_gpu() -> None:
    placement = Placement.on(DeviceChoice((CPU,), "as configured"), EngineSettings())
    assert (placement.devices, placement.gpu) == ((CPU,), False)


def test_every_model_has_engines_of_its_own() -> None:
    placement = Placement((Device(DeviceKind.CUDA), Device(DeviceKind.CUDA, 1)), settings(instances=2))
    assert [str(device) for device in placement.devices_of("digits")] == ["cuda:0", "cuda:1"] * 2
    assert placement.on_cpu().devices_of("digits") == (CPU, CPU)
    assert Placement(settings=settings(instances="auto")).devices_of("digits") == (CPU,)


@pytest.mark.parametrize(
    ("cores", "configured", "expected"),
    [
        (8, settings(), CpuThreads(None, 8, False)),
        (8, settings(instances=2), CpuThreads(None, 4, False)),
        (2, settings(instances=4), CpuThreads(None, 1, False)),
        (8, settings(instances=2, threads=3), CpuThreads(3, 4, False)),
        (8, settings(threads=1, spinning=True), CpuThreads(1, 8, True)),
    ],
)
def test_engines_share_the_cores(cores: int, configured: EngineSettings, expected: CpuThreads) -> None:
    assert Placement(settings=configured, cores=cores).cpu_threads("digits") == expected


@pytest.mark.parametrize(
    ("configured", "free"),
    [
        (settings(), False),  # all cores compute
        (settings(threads=4), True),
        (settings(threads=5), False),
        (settings(threads=2, instances=2), True),
        (settings(threads=3, instances=2), False),
        (settings(threads=1), False),  # one thread has none to wait for
        (settings(threads=4, spinning=False), False),
        (settings(threads=4, spinning=True), False),
    ],
)
def test_threads_may_spin_where_four_cores_are_left(configured: EngineSettings, free: bool) -> None:
    placement = Placement(settings=configured, cores=8)
    assert placement.spinning_is_free("digits") is free
    measured = dataclasses.replace(placement, auto_spinning=True).cpu_threads("digits").spinning
    assert measured is (configured.spinning.of("digits") is not False)


@pytest.mark.parametrize(
    ("configured", "cores", "expected"),
    [(settings(), 4, [4, 1]), (settings(), 1, [1]), (settings(threads=3), 4, [3])],
)
def test_quick_models_get_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configured: EngineSettings, cores: int, expected: list[int]
) -> None:
    """Unless the number is set."""
    asked: list[int] = []

    def create(model: bytes, threads: int, spinning: bool) -> ort.InferenceSession:
        asked.append(threads)
        return create_session(model, 1)

    monkeypatch.setattr(selection, "create_session", create)
    monkeypatch.setattr(selection, "run_seconds", lambda *_: [1e-4])
    Placement(settings=configured, cores=cores).load(CPU, model_of(publish_classifier(tmp_path)))
    assert asked == expected


def test_a_file_that_onnx_runtime_refuses_is_a_bundle_error(tmp_path: Path) -> None:
    broken = dataclasses.replace(model_of(publish_classifier(tmp_path)), content=b"not a model")
    with pytest.raises(BundleError, match="does not run the model"):
        Placement().load(CPU, broken)
