"""TensorRT, where it is installed: built once, kept in a folder of our own, and as right as everything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from rafaga.errors import DeviceError
from rafaga.server.config.device import Device, DeviceKind
from rafaga.server.engines import devices
from rafaga.server.engines.devices import Nvidia
from rafaga.server.engines.onnxruntime import Engine
from rafaga.server.engines.selection import GpuSettings
from tests.bundles import convolve, publish_convolutions, publish_forecaster
from tests.gpu.conftest import placed, task


@pytest.fixture
def tensorrt(device: Device) -> Device:
    tensorrt = Device(DeviceKind.TENSORRT, device.index)
    try:
        devices.check(tensorrt, Nvidia())
    except DeviceError as error:
        pytest.skip(f"no TensorRT: {error}")
    return tensorrt


def on_tensorrt(engine: Engine) -> bool:
    """And not on CUDA, as where its answers were wrong."""
    assert isinstance(engine.session, ort.InferenceSession)
    return Device(DeviceKind.TENSORRT).provider in engine.session.get_providers()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("publish", [publish_convolutions, publish_forecaster])
def test_built_once(tensorrt: Device, tmp_path: Path, publish: Callable[[Path], Path]) -> None:
    cache = tmp_path / "cache"
    placement = placed(tensorrt, GpuSettings(tensorrt_cache=cache))
    given, _, golden = task(publish(tmp_path))
    for _ in range(2):
        engine = placement.engine(tensorrt, given)
        golden.check(engine.run(golden.inputs), 5e-3)
        assert on_tensorrt(engine)
        assert engine.close()
        built = {path: path.stat().st_mtime_ns for path in cache.rglob("*.engine")}
        assert built
    assert (cache.stat().st_mode & 0o777) == 0o700
    engine = placement.engine(tensorrt, given)
    assert engine.close()
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.engine")} == built, "nothing was built again"


@pytest.mark.timeout(600)
def test_every_size(tensorrt: Device, tmp_path: Path) -> None:
    placement = placed(tensorrt, GpuSettings(tensorrt_cache=tmp_path / "cache"))
    given, _, _ = task(publish_convolutions(tmp_path))
    engine = placement.engine(tensorrt, given)
    assert on_tensorrt(engine)
    for rows in (1, 3, 8, 11):
        image = np.random.default_rng(rows).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
        np.testing.assert_allclose(engine.run((image,))[0], convolve(image), rtol=5e-3, atol=5e-3)
    assert engine.close()
