"""Served models that end with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.unit.server.execution.fakes import Served


@pytest.fixture
def start() -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(**arguments: Any) -> Served:
        started.append(Served(**arguments))
        return started[-1]

    yield start
    for served in started:
        served.end()


@pytest.fixture
def served(start: Callable[..., Served]) -> Served:
    return start()
