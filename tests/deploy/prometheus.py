"""A real Prometheus (Debian's) that scrapes twice a second."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.monitoring.__main__ import as_yaml
from deploy.monitoring.rules import rule_file
from deploy.monitoring.signals import Pace
from tests.integration.serving import PATIENCE_S, free_port

HURRY = Pace(window="4s", recording_window="4s", restart_window="20s", pending="1s")


class Prometheus:
    def __init__(self, address: str) -> None:
        self._address = address

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=PATIENCE_S) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector; fails the test if Prometheus refuses the expression."""
        answer = self._get(f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def firing(self) -> dict[str, str]:
        """Name and summary of every firing alert."""
        return {
            alert["labels"]["alertname"]: alert["annotations"]["summary"]
            for alert in self._get("/api/v1/alerts")["data"]["alerts"]
            if alert["state"] == "firing"
        }

    def rule_faults(self) -> list[str]:
        groups = self._get("/api/v1/rules")["data"]["groups"]
        return [rule["lastError"] for group in groups for rule in group["rules"] if rule.get("lastError")]

    def _get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://{self._address}{path}", timeout=PATIENCE_S) as answer:
            return dict(json.load(answer))


@contextmanager
def scraping(folder: Path, *targets: str) -> Iterator[Prometheus]:
    """Scrapes `targets` ("host:port") and evaluates the project's rules. Skips the test if Prometheus is missing."""
    if (binary := shutil.which("prometheus")) is None:
        pytest.skip("prometheus (Debian: prometheus) is not installed")
    (folder / "rules.yaml").write_text(as_yaml(rule_file(HURRY)))
    (folder / "prometheus.yaml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
                "rule_files": ["rules.yaml"],
                "scrape_configs": [{"job_name": "rafaga", "static_configs": [{"targets": list(targets)}]}],
            }
        )
    )
    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    prometheus = Prometheus(address)
    try:
        end = time.monotonic() + PATIENCE_S
        while not prometheus.ready():
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            assert time.monotonic() < end, "Prometheus is not ready"
            time.sleep(0.1)
        yield prometheus
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
