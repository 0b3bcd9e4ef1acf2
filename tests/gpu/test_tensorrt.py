"""TensorRT, where it is installed: built once, kept in a folder of our own, and as right as everything else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rafaga.errors import DeviceError
from rafaga.server.config.device import Device, DeviceKind
from rafaga.server.engines import devices
from rafaga.server.engines.contract import run_in_batches
from rafaga.server.engines.devices import Nvidia
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


@pytest.fixture
def on_tensorrt(caplog: pytest.LogCaptureFixture) -> Callable[[], bool]:
    """Whether the last model was loaded there, and not on CUDA, as when its answers are wrong."""
    caplog.set_level(logging.INFO)

    def found() -> bool:
        *_, last = (vars(r)["device"] for r in caplog.records if r.message == "model on the GPU")
        return str(last).startswith("tensorrt")

    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("publish", [publish_convolutions, publish_forecaster])
def test_built_once(
    tensorrt: Device, on_tensorrt: Callable[[], bool], tmp_path: Path, publish: Callable[[Path], Path]
) -> None:
    cache = tmp_path / "cache"
    placement = placed(tensorrt, tensorrt_cache=cache)
    given, _, golden = task(publish(tmp_path))
    for _ in range(2):
        engine = placement.load(tensorrt, given).engine
        golden.check(run_in_batches(engine, golden.inputs, given.max_rows), 5e-3)
        assert on_tensorrt()
        assert engine.close()
        built = {path: path.stat().st_mtime_ns for path in cache.rglob("*.engine")}
        assert built
    assert (cache.stat().st_mode & 0o777) == 0o700
    engine = placement.load(tensorrt, given).engine
    assert engine.close()
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.engine")} == built, "nothing was built again"


@pytest.mark.timeout(600)
def test_every_size(tensorrt: Device, on_tensorrt: Callable[[], bool], tmp_path: Path) -> None:
    placement = placed(tensorrt, tensorrt_cache=tmp_path / "cache")
    given, _, _ = task(publish_convolutions(tmp_path))
    engine = placement.load(tensorrt, given).engine
    assert on_tensorrt()
    for rows in (1, 3, 8, 11):
        image = np.random.default_rng(rows).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
        got = np.float32(run_in_batches(engine, (image,), 8)[0])
        np.testing.assert_allclose(got, convolve(image), rtol=5e-3, atol=5e-3)
    assert engine.close()
