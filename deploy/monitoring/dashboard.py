"""The dashboard in Grafana's JSON model: rows of three panels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deploy.monitoring.panels import Panel, Row

_COLUMNS = 3
_WIDTH = 24 // _COLUMNS  # Grafana's grid has 24 columns
_HEIGHT = 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard(rows: tuple[Row, ...]) -> dict[str, Any]:
    return {
        "uid": "rafaga",
        "title": "Rafaga",
        "schemaVersion": 39,
        "tags": ["rafaga"],
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "15s",
        "templating": {"list": [_source_variable(), _job_variable()]},
        "panels": list(_panels(rows)),
    }


def _panels(rows: tuple[Row, ...]) -> Iterator[dict[str, Any]]:
    number, y = 1, 0
    for row in rows:
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
        }
        number, y = number + 1, y + 1
        for i, panel in enumerate(row.panels):
            place = {"x": i % _COLUMNS * _WIDTH, "y": y + i // _COLUMNS * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            yield _panel(panel, number, place)
            number += 1
        y += -(-len(row.panels) // _COLUMNS) * _HEIGHT


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 10}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query.expression, "legendFormat": query.legend, "datasource": _SOURCE}
            for i, query in enumerate(panel.queries)
        ],
    }


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _job_variable() -> dict[str, Any]:
    return {
        "name": "job",
        "label": "Job",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": "label_values(rafaga_requests_in_flight, job)", "refId": "job"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }
