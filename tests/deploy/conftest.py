"""The servers of the integration tests, over the transport that manifests use."""

from __future__ import annotations

import pytest

from tests.integration.conftest import repository, serve, server, valve

__all__ = ["repository", "serve", "server", "valve"]


@pytest.fixture(scope="session")
def transport() -> str:
    return "grpcio"
