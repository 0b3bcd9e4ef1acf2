"""A real Prometheus scrapes a loaded server, evaluates the rules, and answers the queries of the dashboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from deploy.monitoring.__main__ import as_yaml
from deploy.monitoring.rules import rule_file
from deploy.monitoring.signals import Pace
from rafaga.server.config.settings import ModelControl
from tests import bundles
from tests.deploy.rendering import ROOT
from tests.integration import messages
from tests.integration.serving import PATIENCE_S, Serve, Served, eventually, free_port, wait_for_queue
from tests.integration.valve import Valve
from tests.unit.server.fake_nvml import FakeNvml

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
def scraping(folder: Path, target: str) -> Iterator[Prometheus]:
    """Scrapes `target` ("host:port") and evaluates the project's rules. Skips the test if Prometheus is missing."""
    if (binary := shutil.which("prometheus")) is None:
        pytest.skip("prometheus (Debian: prometheus) is not installed")
    (folder / "rules.yaml").write_text(as_yaml(rule_file(HURRY)))
    often = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "500ms")
    jobs = [{"job_name": "rafaga", "static_configs": [{"targets": [target]}]}]
    configuration = {"global": often, "rule_files": ["rules.yaml"], "scrape_configs": jobs}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    places = [f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
    command = [binary, *places, f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
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


MODEL = "digits"
DIGIT = messages.random_digits(0)


def one_of_each(served: Served, valve: Valve) -> None:
    """Calls after which every series has been counted once."""
    served.vision.Classify(messages.classify(DIGIT))
    served.vision.Classify(messages.classify_files(messages.png(DIGIT[0, :, :, 0])))
    served.forecasting.Forecast(messages.forecast([1.0, 2.0, 3.0]))
    with pytest.raises(grpc.RpcError):  # an input that the engine fails on
        served.vision.Classify(messages.classify(np.full((1, 1, 1, 1), 200, np.uint8), "fragile"))
    with valve.closed():
        running = served.vision.Classify.future(messages.classify(DIGIT))
        valve.wait_for_engine()
        hangs_up = served.vision.Classify.future(messages.classify(DIGIT))
        wait_for_queue(served, MODEL, 1)
        hangs_up.cancel()
        wait_for_queue(served, MODEL, 0)
        served.predict(MODEL, 30.0)
        with pytest.raises(grpc.RpcError):  # cannot be answered in time
            served.vision.Classify(messages.classify(DIGIT), timeout=1)
        served.predict(MODEL, 0.001)
    running.result(PATIENCE_S)


def change_models(served: Served, models: Path) -> None:
    """One model gets a new version, and the version after it is refused."""
    bundles.publish_classifier(models, MODEL)
    eventually(lambda: served.metric("rafaga_model_swap_seconds", model=MODEL) > 0, "version 2 serves")
    shutil.copytree(models / MODEL / "2", models / MODEL / ".3")
    (models / MODEL / ".3" / "model.onnx").write_bytes(b"damaged")
    (models / MODEL / ".3").rename(models / MODEL / "3")
    eventually(lambda: served.metric("rafaga_model_load_failures_total", model=MODEL) > 0, "version 3 is refused")


@contextmanager
def load(served: Served, calls_per_s: float) -> Iterator[None]:
    """Sends at a constant rate and ignores the answers."""
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(1 / calls_per_s):
            served.vision.Classify.future(messages.classify(DIGIT))
            served.forecasting.Forecast.future(messages.forecast([1.0, 2.0, 3.0]))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(PATIENCE_S)


def dashboard_queries() -> dict[str, str]:
    """Expressions by panel, the way Grafana would send them."""
    board = json.loads((ROOT / "deploy/grafana/rafaga.json").read_text())
    return {
        f"{panel['title']} {target['legendFormat']}": target["expr"]
        .replace("$job", ".+")
        .replace("$__rate_interval", HURRY.window)
        for panel in board["panels"]
        for target in panel.get("targets", ())
    }


def test_prometheus_watches_a_server_through_an_overload(
    serve: Serve, valve: Valve, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. Under load every query of the dashboard has an answer, and no alert fires except for a refused version. 2. The
    engine stalls: requests queue up and are refused, and alerts fire. 3. It continues: they clear. 4. The server stops:
    RafagaAbsent fires."""
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    models = tmp_path / "models"
    shutil.copytree(repository, models)
    served = serve(models, max_queue_requests=8, model_control=ModelControl.POLL, poll_interval_s=0.1)
    one_of_each(served, valve)
    change_models(served, models)
    with scraping(tmp_path, f"127.0.0.1:{served.server.http_port}") as prometheus:
        with load(served, calls_per_s=20):
            eventually(lambda: prometheus.query("rafaga:utilisation_ratio > 0"), "utilisation is recorded")
            for panel, expression in dashboard_queries().items():
                eventually(lambda e=expression: prometheus.query(e), f"{panel} shows something")
            assert prometheus.rule_faults() == []
            assert prometheus.firing().keys() <= {"RafagaModelRefused", "RafagaEngineFailing"}

            served.predict(MODEL, 30.0)  # predicted waits then match the stall
            with valve.closed():
                eventually(lambda: "RafagaOverloaded" in prometheus.firing(), "RafagaOverloaded fires")
                assert re.match(r"[0-9.]+% of the calls are refused", prometheus.firing()["RafagaOverloaded"])
                eventually(lambda: "RafagaQueueing" in prometheus.firing(), "RafagaQueueing fires")
            served.predict(MODEL, 0.001)
            eventually(lambda: not {"RafagaOverloaded", "RafagaQueueing"} & prometheus.firing().keys(), "both clear")
        served.server.drain_and_stop()
        eventually(lambda: "RafagaAbsent" in prometheus.firing(), "RafagaAbsent fires")


def test_triton_names_give_the_same_figures(serve: Serve, valve: Valve) -> None:
    served = serve(triton_metrics=True)
    one_of_each(served, valve)
    labels = {"model": MODEL, "version": "1"}
    assert served.metric("nv_inference_request_success", **labels) == 3
    assert served.metric("nv_inference_count", **labels) == served.metric("rafaga_batch_size_sum", model=MODEL)
    assert served.metric("nv_inference_exec_count", **labels) == served.metric("rafaga_batch_size_count", model=MODEL)
    assert served.metric("nv_inference_request_failure", model="fragile") == 1
    assert served.metric("nv_inference_pending_request_count", **labels) == 0
    queue, engine, both = (
        served.metric(f"nv_inference_{name}_us", **labels)
        for name in ("queue_duration", "compute_infer_duration", "request_duration")
    )
    assert both == pytest.approx(queue + engine)
    assert engine > 0
    for part in ("compute_input", "compute_output"):  # not measured, but a missing series would empty every sum
        assert served.metric(f"nv_inference_{part}_duration_us", **labels) == 0
