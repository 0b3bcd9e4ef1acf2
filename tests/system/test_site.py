"""The documentation's site (`make docs`): it builds without warnings, loads nothing from elsewhere, and is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import FileDescriptor

import rafaga
from rafaga.errors import RafagaError
from rafaga.v1 import catalog_pb2, forecasting_pb2, sequences_pb2, vision_pb2
from tests.documents import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_block_is_rendered_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        assert "```" not in text, page
        assert "--8&lt;--" not in text, page
        assert not re.search(r'<(?:script|link|img)[^>]* (?:src|href)="(?:https?:)?//', text), page


def test_the_sdk_reference_has_every_public_name(site: Path) -> None:
    text = (site / "reference/sdk.html").read_text()
    for name in rafaga.__all__:
        value = getattr(rafaga, name)
        if isinstance(value, type) and issubclass(value, RafagaError):
            assert name in text
        else:
            assert f'id="rafaga.{name}"' in text


@pytest.mark.parametrize("module", [catalog_pb2, forecasting_pb2, sequences_pb2, vision_pb2])
def test_the_grpc_reference_names_every_method(module: object) -> None:
    page = (ROOT / "docs/reference/protos.md").read_text()
    file: FileDescriptor = module.DESCRIPTOR  # type: ignore[attr-defined]
    assert f'--8<-- "protos/{file.name}"' in page
    for service in file.services_by_name.values():
        assert f"`{service.full_name}`" in page
        assert all(f"`{method.name}`" in page for method in service.methods)
