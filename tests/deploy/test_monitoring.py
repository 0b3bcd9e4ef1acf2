"""Metrics, their page, rules and dashboard: generated from one list, consistent with the server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from deploy.monitoring.__main__ import files
from deploy.monitoring.panels import rows
from deploy.monitoring.signals import Pace, alerts, recordings
from rafaga.server.observability.families import FAMILIES, GPU_FAMILIES, LABELS
from rafaga.server.observability.metrics import Metrics
from tests.deploy.commands import promtool
from tests.deploy.rendering import KUBERNETES, ROOT, Object, one, overlay

_OF_THE_PROCESS = ("cpu_seconds_total", "resident_memory_bytes", "open_fds", "start_time_seconds")
PROCESS = {f"process_{name}" for name in _OF_THE_PROCESS}
SERIES = {series for family in FAMILIES + GPU_FAMILIES for series in family.series} | PROCESS
RECORDED = {recording.name for recording in recordings(Pace())}
NAME = re.compile(r"\b(?:rafaga|process|nv)[_:][a-z0-9_:]+")


def test_generated_files_are_current() -> None:
    for path, text in files().items():
        assert (ROOT / path).read_text() == text, f"{path}: run `python -m deploy.monitoring`"


def test_the_list_is_what_the_server_exports() -> None:
    counted = {family.name: family.documentation for family in Metrics().registry.collect()}
    own = {name: text for name, text in counted.items() if not name.startswith(("process_", "python_"))}
    assert own == {family.name: family.text for family in FAMILIES}
    given = set(counted) | {f"{name}_total" for name in counted}
    assert given >= PROCESS
    assert {label for family in FAMILIES + GPU_FAMILIES for label in family.labels} == LABELS.keys()


def queries() -> Iterator[tuple[str, str]]:
    """(where, expression) of every Prometheus query of the project."""
    yield from ((alert.name, alert.expression) for alert in alerts(Pace()))
    yield from ((recording.name, recording.expression) for recording in recordings(Pace()))
    for row in rows():
        for panel in row.panels:
            yield from ((panel.title, query.expression) for query in panel.queries)
    scaled = yaml.safe_load((KUBERNETES / "components/keda/scaled-object.yaml").read_text())
    yield from (("ScaledObject", trigger["metadata"]["query"]) for trigger in scaled["spec"]["triggers"])


def test_every_query_uses_series_that_exist() -> None:
    for where, expression in queries():
        names = set(NAME.findall(expression))
        assert names, where
        assert names <= SERIES | RECORDED, where


def test_hpa_adapter_and_keda_use_the_same_series_and_targets() -> None:
    (rule,) = yaml.safe_load((ROOT / "deploy/prometheus/adapter.yaml").read_text())["rules"]["custom"]
    matcher = re.search(r'__name__=~"(.+?)"', rule["seriesQuery"])
    assert matcher
    given = {
        re.sub(rule["name"]["matches"], rule["name"]["as"].replace("$", "\\"), name)
        for name in RECORDED
        if re.fullmatch(matcher[1].replace("^", ""), name)
    }
    metrics = one(overlay("cpu"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert {metric["pods"]["metric"]["name"] for metric in metrics} == given
    scaled = yaml.safe_load((KUBERNETES / "components/keda/scaled-object.yaml").read_text())["spec"]
    hpa = [int(m["pods"]["target"]["averageValue"].removesuffix("m")) / 1000 for m in metrics]
    assert hpa == [float(trigger["metadata"]["threshold"]) for trigger in scaled["triggers"]]


class Story(NamedTuple):
    """Series in promtool's notation, one value every 15 s; when the alert fires, and when it no longer does."""

    series: dict[str, str]
    fires: str
    over: str


def _server(name: str, labels: str = "") -> str:
    return f'{name}{{instance="a",job="rafaga"{labels and "," + labels}}}'


OK = _server("rafaga_requests_total", 'method="m",code="OK"')
CALLS = {OK: "0+100x240", _server("rafaga_requests_in_flight"): "0x240"}


def _story(series: str, labels: str, values: str, fires: str = "15m", over: str = "40m") -> Story:
    return Story(CALLS | {_server(series, labels): values}, fires, over)


STORIES = {
    "RafagaAbsent": Story({_server("rafaga_requests_in_flight"): "_x40 0x200"}, "8m", "12m"),
    "RafagaModelNotReady": _story("rafaga_model_ready", 'model="m"', "0x40 1x200", "8m", "12m"),
    "RafagaFailing": _story("rafaga_requests_total", 'method="m",code="INTERNAL"', "0+1x80 80x160"),
    "RafagaOverloaded": _story("rafaga_refusals_total", 'method="m",reason="QUEUE_FULL"', "0+10x80 800x160"),
    "RafagaLate": _story("rafaga_dropped_total", 'model="m",cause="deadline"', "0+2x80 160x160"),
    "RafagaQueueing": _story("rafaga_queue_predicted_wait_seconds", 'model="m"', "0.8x80 0.01x160"),
    "RafagaEngineFailing": _story("rafaga_engine_failures_total", 'model="m"', "0+1x80 80x160"),
    "RafagaEngineLost": _story("rafaga_engine_restarts_total", 'model="m"', "0x20 1x220", "6m"),
    "RafagaModelRefused": _story(
        "rafaga_model_load_failures_total", 'model="m",version="2"', "_x20 1x220", "6m", "15m"
    ),
    "RafagaRestarting": _story("process_start_time_seconds", "", "1x10 2x10 3x10 4x210", "10m", "50m"),
}

# All series of a healthy server.
HEALTHY = CALLS | {
    _server("rafaga_model_ready", 'model="m",version="1"'): "1x240",
    _server("rafaga_model_ready", 'model="m",version="2"'): "0x240",
    _server("rafaga_refusals_total", 'method="m",reason="QUEUE_FULL"'): "0+1x240",
    _server("rafaga_refusals_total", 'method="m",reason="INVALID_TENSOR"'): "0+90x240",
    _server("rafaga_dropped_total", 'model="m",cause="cancelled"'): "0+50x240",
    _server("rafaga_queue_predicted_wait_seconds", 'model="m"'): "0.2x240",
    _server("rafaga_requests_total", 'method="m",code="INVALID_ARGUMENT"'): "0+90x240",
    _server("rafaga_rejected_inputs_total", 'model="m"'): "0+90x240",
    _server("rafaga_engine_failures_total", 'model="m"'): "0x240",
    _server("rafaga_engine_restarts_total", 'model="m"'): "0x240",
    _server("rafaga_model_load_failures_total", 'model="m",version="1"'): "1x240",
    _server("process_start_time_seconds"): "1x240",
}


def firing(name: str, at: str, alerts_firing: int) -> Object:
    return {
        "expr": f'count(ALERTS{{alertname=~"{name}",alertstate="firing"}})',
        "eval_time": at,
        "exp_samples": [{"labels": "{}", "value": alerts_firing}] if alerts_firing else [],
    }


def play(folder: Path, series: dict[str, str], expected: list[Any]) -> None:
    """Evaluates the rules over `series` in simulated time."""
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": expected,
    }
    rules = [str(ROOT / "deploy/prometheus/rules.yaml")]
    tests = {"rule_files": rules, "evaluation_interval": "15s", "tests": [test]}
    (folder / "test.yaml").write_text(yaml.safe_dump(tests))
    promtool(["promtool", "test", "rules", folder / "test.yaml"])


def test_prometheus_accepts_rules_and_configuration() -> None:
    promtool(["promtool", "check", "rules", "deploy/prometheus/rules.yaml"])
    promtool(["promtool", "check", "config", "deploy/prometheus/prometheus.yaml"])


@pytest.mark.parametrize("alert", [alert.name for alert in alerts(Pace())])
def test_an_alert_fires_and_clears_afterwards(alert: str, tmp_path: Path) -> None:
    series, fires, over = STORIES[alert]
    play(tmp_path, series, [firing(alert, "1m", 0), firing(alert, fires, 1), firing(alert, over, 0)])


def test_a_second_refusal_fires_again(tmp_path: Path) -> None:
    series = CALLS | {_server("rafaga_model_load_failures_total", 'model="m",version="2"'): "_x20 1x60 2x160"}
    name = "RafagaModelRefused"
    play(tmp_path, series, [firing(name, at, n) for at, n in (("15m", 0), ("21m", 1), ("30m", 0))])


def test_a_healthy_server_raises_no_alert(tmp_path: Path) -> None:
    play(tmp_path, HEALTHY, [firing(".+", at, 0) for at in ("5m", "20m", "50m")])


def test_recorded_series_keep_the_labels_of_the_scraped_server(tmp_path: Path) -> None:
    pod = 'instance="a",job="rafaga",namespace="n",pod="p"'
    series = {
        f'rafaga_queue_predicted_wait_seconds{{{pod},model="{model}"}}': f"{wait}x20"
        for model, wait in (("a", 0.1), ("b", 0.3))
    }
    for model, rows_, capacity in (("a", 150, 100), ("b", 300, 200)):  # 10 and 20 rows/s of 100 and 200
        series[f'rafaga_batch_size_sum{{{pod},model="{model}"}}'] = f"0+{rows_}x20"
        series[f'rafaga_model_capacity_rows_per_second{{{pod},model="{model}"}}'] = f"{capacity}x20"

    def expect(name: str, value: float) -> Object:
        return {"expr": name, "eval_time": "4m", "exp_samples": [{"labels": f"{name}{{{pod}}}", "value": value}]}

    play(tmp_path, series, [expect("rafaga:predicted_wait_seconds", 0.3), expect("rafaga:utilisation_ratio", 0.2)])
