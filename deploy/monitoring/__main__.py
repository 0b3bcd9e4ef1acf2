"""`python -m deploy.monitoring`: writes the generated files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deploy.monitoring.dashboard import dashboard
from deploy.monitoring.page import page
from deploy.monitoring.panels import rows
from deploy.monitoring.rules import prometheus_rule, rule_file
from deploy.monitoring.signals import Pace

ROOT = Path(__file__).parents[2]
_NOTE = "# Made by `python -m deploy.monitoring`; do not edit.\n"


def files() -> Mapping[Path, str]:
    """The text of every generated file, by its path in the checkout."""
    pace = Pace()
    return {
        Path("docs/metrics.md"): page(pace),
        Path("deploy/prometheus/rules.yaml"): _NOTE + as_yaml(rule_file(pace)),
        Path("deploy/kubernetes/components/monitoring/prometheus-rule.yaml"): _NOTE + as_yaml(prometheus_rule(pace)),
        Path("deploy/grafana/rafaga.json"): json.dumps(dashboard(rows()), indent=2) + "\n",
    }


def as_yaml(value: dict[str, Any]) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, width=1000))


def main() -> None:
    for path, text in files().items():
        (ROOT / path).write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
