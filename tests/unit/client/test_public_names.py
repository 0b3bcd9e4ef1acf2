"""What `import rafaga` gives, and what it must not drag in."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from inspect import ismodule

import pytest

import rafaga
from rafaga import errors

# What a base install has besides the standard library; grpc looks for its companions by itself.
BASE = {"grpc", "google", "numpy", "rafaga", "typing_extensions", "grpc_tools", "grpc_health", "grpc_reflection"}


def test_all_names_every_public_name_and_no_other() -> None:
    bound = {name for name, value in vars(rafaga).items() if not name.startswith("_") and not ismodule(value)}
    assert list(rafaga.__all__) == sorted(bound)
    kinds = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    raised = {name for name, kind in kinds.items() if issubclass(kind, Exception)}
    assert raised - bound <= {name for name, kind in kinds.items() if issubclass(kind, errors.BundleError)}


def test_the_version() -> None:
    assert rafaga.__version__ == metadata.version("rafaga")
    with pytest.raises(AttributeError, match="module 'rafaga' has no attribute 'Cliant'"):
        rafaga.Cliant  # type: ignore[attr-defined]  # noqa: B018


def test_importing_rafaga_imports_the_base_install_only() -> None:
    command = [sys.executable, "-c", "import sys, rafaga, rafaga.cli; print(*sys.modules)"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"rafaga.inference.open_inference_pb2"} & set(found), "two modules that define its symbols clash"
    packages = {name.partition(".")[0] for name in found}
    loaded = {name for name in packages if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert not loaded & {"onnxruntime", "PIL", "torch", "msgspec", "rich", "prometheus_client", "pandas", "matplotlib"}
    # Editable installs and site hooks load finders of their own; all else must be of the base.
    others = {name for name in loaded - BASE if not name.endswith(("_finder", "_hack"))}
    assert others <= {"sitecustomize", "cython_runtime"}
