"""`rafaga serve` on the device, as a process, asked by the SDK."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from demo.server import ServerProcess
from rafaga import Client
from rafaga.server.config.device import Device
from tests.bundles import classify, features, forecast, publish_backbone, publish_classifier, publish_forecaster

_SECONDS = 60.0


@pytest.mark.timeout(300)
def test_end_to_end(device: Device, tmp_path: Path) -> None:
    """1. Three kinds of models are served there. 2. Many callers at once. 3. It says where it runs. 4. It ends."""
    repository = tmp_path / "repository"
    for publish in (publish_classifier, publish_backbone, publish_forecaster):
        publish(repository)
    server = ServerProcess(repository, tmp_path / "log", ["--device", str(device)], start_timeout_s=200.0)
    try:
        server.start()
        with Client(server.address, timeout_s=_SECONDS) as client, ThreadPoolExecutor(16) as callers:
            digits = np.random.default_rng(0).integers(0, 256, (200, 28, 28, 1), dtype=np.uint8)
            found = list(callers.map(lambda row: client.classify(row, model="digits").top.index, digits))
            assert found == classify(digits).argmax(1).tolist()
            for size in (32, 48, 64):
                photo = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
                (found_map,) = client.features(photo, model="backbone")
                np.testing.assert_allclose(found_map.array, features(photo[np.newaxis])[0], atol=1e-3)
            for length in (3, 30):
                history = np.arange(length, dtype=np.float32)
                got = client.forecast(history, model="series")
                np.testing.assert_allclose(got.values, forecast(history).T, rtol=1e-3)
        log = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
        (chosen,) = (record for record in log if record["message"].startswith("device chosen"))
        assert chosen["devices"] == [str(device)]
        if device.gpu:
            assert sum(record["message"] == "model on the GPU" for record in log) == 3
        assert server.stop() == 0
    except BaseException:
        print(server.last_log_lines())
        raise
    finally:
        server.kill()
