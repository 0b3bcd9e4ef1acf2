"""Alerts, recording rules, dashboard and the page of metrics, all from one list: `python -m deploy.monitoring`.

`signals` says what is watched and why, `panels` what is looked at; `rules`, `dashboard` and `page` put them into the
forms of Prometheus, Grafana and docs/metrics.md. A test writes them again and compares.
"""
