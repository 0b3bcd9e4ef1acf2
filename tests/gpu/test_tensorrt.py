"""TensorRT, where it is installed: built once, kept in a folder of our own, and as right as everything else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from rafaga.errors import DeviceError
from rafaga.server.config.device import Device, DeviceKind
from rafaga.server.engines import devices
from rafaga.server.engines.devices import Nvidia
from tests.bundles import publish_convolutions, publish_forecaster
from tests.gpu.conftest import check_every_size, placed, task


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
def test_built_once_for_every_size(
    tensorrt: Device, on_tensorrt: Callable[[], bool], tmp_path: Path, publish: Callable[[Path], Path]
) -> None:
    cache = tmp_path / "cache"
    placement = placed(tensorrt, tensorrt_cache=cache)
    given, _, golden = task(publish(tmp_path))

    def built() -> dict[Path, int]:
        engine = placement.load(tensorrt, given).engine
        assert on_tensorrt()
        check_every_size(engine, golden, given.max_rows, 5e-3)
        assert engine.close()
        return {path: path.stat().st_mtime_ns for path in cache.rglob("*.engine")}

    first = built()
    assert first
    assert (cache.stat().st_mode & 0o777) == 0o700
    assert built() == first, "nothing was built again"
