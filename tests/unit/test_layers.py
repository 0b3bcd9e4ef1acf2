"""Who may import whom: errors, priority, tensors, bundle, images, int8, … <- client and server <- cli, load, plan."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVICE = Path(__file__).parents[2] / "service" / "rafaga"
BASE = {"errors", "priority", "tensors", "bundle", "images", "int8", "objects", "series", "v1", "inference"}
TOP = {"cli", "load", "plan"}
MODULES = sorted(
    path for path in SERVICE.rglob("*.py") if not {"v1", "inference"} & set(path.relative_to(SERVICE).parts[:1])
)


def imported(path: Path) -> Iterator[str]:
    """Full names of what is imported, wherever in the file: `from rafaga.server import http` is rafaga.server.http."""
    package = ["rafaga", *path.relative_to(SERVICE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer(name: str) -> str:
    """ "server" for rafaga.server.http; "" for what is none of ours."""
    parts = name.split(".")
    return parts[1] if parts[0] == "rafaga" and len(parts) > 1 else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SERVICE)))
def test_imports_point_downwards(path: Path) -> None:
    own = path.relative_to(SERVICE).parts[0].removesuffix(".py")
    used = {found for name in imported(path) if (found := layer(name))}
    if own in BASE:
        assert used <= BASE
    elif own == "client":
        assert not used & {"server", *TOP}
    elif own == "server":
        assert not used & {"client", *TOP}
    elif own == "__init__":
        assert not used & {"server", *TOP}
    else:
        assert own in TOP, f"{own} has no place yet: say here which"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SERVICE)))
def test_the_package_stands_without_the_checkout(path: Path) -> None:
    """models and export are not installed, and a server's image has no torch."""
    assert not {name.split(".")[0] for name in imported(path)} & {"models", "export", "tests", "torch", "torchvision"}


def test_batching_knows_neither_grpc_nor_onnx() -> None:
    for name in ("batcher.py", "latency.py"):
        assert not {n.split(".")[0] for n in imported(SERVICE / "server" / name)} & {"grpc", "onnxruntime", "threading"}
        assert {layer(n) for n in imported(SERVICE / "server" / name)} <= {"", "errors", "priority", "server"}


def test_the_server_is_given_its_environment() -> None:
    readers = {p.name for p in (SERVICE / "server").rglob("*.py") if "os.environ" in p.read_text()}
    assert readers == {"__init__.py"}, "where ONNX Runtime is told to report nothing; config is given what it reads"


def test_the_sdk_is_light() -> None:
    """`import rafaga` in an environment of its own brings neither an inference engine nor an image library."""
    heavy = ["onnxruntime", "PIL", "torch", "onnx", "msgspec", "prometheus_client", "rich", "rafaga.server"]
    code = f"import sys, rafaga; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PYTHONPATH": str(SERVICE.parent)},
    )
    assert done.stdout.strip() == "[]"
