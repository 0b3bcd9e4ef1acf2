"""Alerts, recording rules, dashboard and the page of metrics, from one list: `python -m deploy.monitoring`.

`signals` has the recorded series and alerts, `panels` the dashboard's queries; `rules`, `dashboard` and `page` write
them for Prometheus, Grafana and docs/metrics.md. A test generates the files again and compares.
"""
