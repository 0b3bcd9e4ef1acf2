"""Recording rules and alerts in Prometheus' own form, and wrapped for the Prometheus operator."""

from __future__ import annotations

from typing import Any

from deploy.monitoring.signals import Alert, Pace, alerts, recordings

GUIDE = "docs/operating.md"


def rule_file(pace: Pace) -> dict[str, Any]:
    """The file for Prometheus' `rule_files` and `promtool check rules`."""
    return {
        "groups": [
            {
                "name": "rafaga.recordings",
                "rules": [{"record": r.name, "expr": r.expression} for r in recordings(pace)],
            },
            {"name": "rafaga.alerts", "rules": [_alert(alert, pace) for alert in alerts(pace)]},
        ]
    }


def prometheus_rule(pace: Pace) -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "rafaga"},
        "spec": rule_file(pace),
    }


def _alert(alert: Alert, pace: Pace) -> dict[str, Any]:
    held = {} if alert.at_once else {"for": pace.pending}
    return {
        "alert": alert.name,
        "expr": alert.expression,
        **held,
        "labels": {"severity": alert.severity.value},
        "annotations": {"summary": alert.summary, "guide": f"{GUIDE}#{alert.name.lower()}"},
    }
