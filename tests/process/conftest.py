from __future__ import annotations

from pathlib import Path

import pytest

from tests import bundles


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits, and slow, which answers alike but takes its time."""
    root = tmp_path_factory.mktemp("repository")
    bundles.publish_classifier(root)
    bundles.publish_slow(root)
    return root
