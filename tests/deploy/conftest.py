"""The servers of the integration tests."""

from tests.integration.conftest import repository, serve, server, valve

__all__ = ["repository", "serve", "server", "valve"]
