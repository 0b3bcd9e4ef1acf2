"""KServe's objects against the fields and types of its own SDK.

KServe publishes no schemas of its definitions. The SDK's wheel has them as two literals per model, which are read
without installing the SDK.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

_WHEEL = "kserve==0.21.0"
_PLAIN = {"str": str, "bool": bool, "int": int, "float": (int, float)}


class Definitions:
    """`folder`: keeps the wheel. Skips the test if it cannot be downloaded."""

    def __init__(self, folder: Path) -> None:
        if not list(folder.glob("kserve-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _WHEEL]
            if subprocess.run(command, timeout=120, check=False).returncode:
                pytest.skip(f"{_WHEEL} cannot be downloaded")
        self._models: dict[str, dict[str, str]] = {}
        with zipfile.ZipFile(next(folder.glob("kserve-*.whl"))) as wheel:
            for name in wheel.namelist():
                if name.startswith("kserve/models/v1"):
                    self._read(ast.parse(wheel.read(name)))

    def _read(self, module: ast.Module) -> None:
        for model in (node for node in module.body if isinstance(node, ast.ClassDef)):
            literals = {
                node.targets[0].id: ast.literal_eval(node.value)
                for node in model.body
                if isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id in ("openapi_types", "attribute_map")
            }
            types = literals.get("openapi_types", {})
            self._models[model.name] = {key: types[field] for field, key in literals.get("attribute_map", {}).items()}

    def faults(self, value: Any, kind: str, path: str) -> list[str]:
        """Faults of `value` as a `kind`. Kubernetes' own kinds are not checked."""
        if kind in _PLAIN:
            fits = isinstance(value, _PLAIN[kind]) and (kind == "bool" or not isinstance(value, bool))
            return [] if fits else [f"{path}: expected {kind}, got {value!r}"]
        if kind.startswith("list[") and isinstance(value, list):
            return [f for i, v in enumerate(value) for f in self.faults(v, kind[5:-1], f"{path}[{i}]")]
        if kind.startswith("dict(") and isinstance(value, dict):
            return [f for k, v in value.items() for f in self.faults(v, kind[5:-1].split(", ", 1)[1], f"{path}.{k}")]
        if kind.startswith(("list[", "dict(")) or (kind in self._models and not isinstance(value, dict)):
            return [f"{path}: expected {kind}, got {value!r}"]
        if (fields := self._models.get(kind)) is None:
            return []
        unknown = [f"{path}.{key}: unknown" for key in value if key not in fields]
        known = [key for key in value if key in fields]
        return unknown + [f for key in known for f in self.faults(value[key], fields[key], f"{path}.{key}")]
