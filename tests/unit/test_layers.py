"""Allowed imports. A layer may import what stands before it in LAYERS, and no import may close a cycle."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

SERVICE = Path(__file__).parents[2] / "service"
GENERATED = {"v1", "inference", "onnx"}

# Lowest first; members of one group may import each other, as far as that closes no cycle.
LAYERS = (
    (
        *("addresses", "errors", "evaluation", "files", "priority", "tensors", "bundle", "checksums", "calendar"),
        *("plain_model", "processor", "formats", "images", "int8", "objects", "publishing", "series", "wire"),
        *GENERATED,
    ),
    ("client", "server.config", "server.scheduling", "server.observability"),
    ("server.engines",),
    ("server.execution",),
    ("server.repository",),
    # Services are handed to the Router: they know `Call`, and the transport knows no service.
    ("server.transport",),
    ("server.services",),
    ("server.lifecycle",),
    ("server.app",),
    ("options", "cli", "load", "plan"),
)
RANK = {name: rank for rank, group in enumerate(LAYERS) for name in group}


def imports(path: Path) -> set[str]:
    """Full dotted names of the modules of ours, and the packages of others, that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else str(node.module))
    return found


def _name(path: Path) -> str:
    return ".".join(path.relative_to(SERVICE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    _name(path): path
    for path in SERVICE.rglob("*.py")
    if path.relative_to(SERVICE).parts[1] not in GENERATED or path.name == "__init__.py"
}
IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def layer(module: str) -> str:
    """ "server.engines" for rafaga.server.engines.cuda; "" for rafaga itself and for what is not ours."""
    root, *rest = module.split(".")
    if root != "rafaga" or not rest:
        return ""
    return ".".join(rest[:2]) if rest[0] == "server" else rest[0]


def test_imports_point_downwards() -> None:
    upward = [
        f"{module} imports {used}"
        for module, names in IMPORTS.items()
        for used in names
        if layer(module) in RANK and RANK.get(layer(used), -1) > RANK[layer(module)]
    ]
    assert not upward
    placeless = {name for module in MODULES if (name := layer(module)) not in RANK} - {"", "server", "__main__"}
    assert not placeless, "give each package a place in LAYERS"


def test_nothing_imports_in_a_circle() -> None:
    graph = {module: {name for name in names if name in MODULES} for module, names in IMPORTS.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_package_needs_no_checkout() -> None:
    """models and export are not installed, and a server's image has no torch."""
    used = {name.split(".")[0] for names in IMPORTS.values() for name in names}
    assert not used & {"models", "export", "tests", "torch", "torchvision"}


def test_scheduling_knows_neither_grpc_nor_onnx() -> None:
    for name in ("batcher", "latency"):
        used = {imported.split(".")[0] for imported in IMPORTS[f"rafaga.server.scheduling.{name}"]}
        assert not used & {"grpc", "onnxruntime", "threading"}


def test_the_server_is_given_its_environment() -> None:
    """Only `rafaga.server` itself touches it, to switch off ONNX Runtime's telemetry."""
    readers = {name for name, path in MODULES.items() if "rafaga.server" in name and "os.environ" in path.read_text()}
    assert readers == {"rafaga.server"}
