"""KServe's objects against the fields and types that its own SDK is generated with.

Its definitions are published nowhere as schemas alone. The SDK's wheel carries them, as two literals per model, which
are read without installing what the SDK needs.
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
    """`place`: a folder for the wheel. Skips the test when it cannot be had."""

    def __init__(self, place: Path) -> None:
        found = list(place.glob("kserve-*.whl"))
        if not found:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), _WHEEL]
            if subprocess.run(command, timeout=120, check=False).returncode:
                pytest.skip(f"{_WHEEL} is out of reach")
            found = list(place.glob("kserve-*.whl"))
        self._models: dict[str, dict[str, str]] = {}
        with zipfile.ZipFile(found[0]) as wheel:
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
        """What is wrong with `value`, which is said to be a `kind`. Kubernetes' own kinds are not looked into."""
        if kind in _PLAIN:
            fits = isinstance(value, _PLAIN[kind]) and (kind == "bool" or not isinstance(value, bool))
            return [] if fits else [f"{path}: expected {kind}, got {value!r}"]
        if kind.startswith("list["):
            if not isinstance(value, list):
                return [f"{path}: expected a list, got {value!r}"]
            return [f for i, v in enumerate(value) for f in self.faults(v, kind[5:-1], f"{path}[{i}]")]
        if kind.startswith("dict("):
            if not isinstance(value, dict):
                return [f"{path}: expected a mapping, got {value!r}"]
            of = kind[5:-1].split(", ", 1)[1]
            return [f for k, v in value.items() for f in self.faults(v, of, f"{path}.{k}")]
        fields = self._models.get(kind)
        if fields is None:
            return []
        if not isinstance(value, dict):
            return [f"{path}: expected {kind}, got {value!r}"]
        unknown = [f"{path}.{key}: unknown" for key in value if key not in fields]
        return unknown + [
            f for key, v in value.items() if key in fields for f in self.faults(v, fields[key], f"{path}.{key}")
        ]
