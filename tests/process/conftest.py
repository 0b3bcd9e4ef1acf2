from __future__ import annotations

from pathlib import Path

import pytest

from tests import bundles


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits and series."""
    root = tmp_path_factory.mktemp("repository")
    bundles.publish_classifier(root)
    bundles.publish_forecaster(root)
    return root


@pytest.fixture(scope="session")
def slow_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits, and slow, which answers alike but takes its time, in its warm-up too."""
    root = tmp_path_factory.mktemp("slow")
    bundles.publish_classifier(root)
    bundles.publish_slow(root, products=1)
    return root
