from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from export.evidence import Sources
from export.publish import ExportRequest, publish
from models.progress import Silent
from tests.export import small
from tests.models.support import data_root


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    return data_root("mnist/t10k-images-idx3-ubyte.gz")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: a classifier in every precision, described by text that HTML must escape, and a forecaster."""
    repository = tmp_path_factory.mktemp("repository")
    for entry in (replace(small.classifier(), architecture="<b>two</b> convolutions & more"), small.forecaster()):
        publish(entry, ExportRequest(repository, weights="random"), Sources(), Silent())
    return repository
